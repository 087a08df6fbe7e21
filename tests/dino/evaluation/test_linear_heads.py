import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dino.evaluation import linear_heads
from dino.evaluation.linear_heads import Heads, Recipe, Standardise, train_heads

CPU = torch.device("cpu")
RATES = (0.03, 0.3, 6.0)


def recipe(**changed):
    settings = {
        "num_classes": 4,
        "epochs": 3,
        "batch_size": 16,
        "device": CPU,
        "precision": "fp32",
        "seed": 5,
    }
    return Recipe(**{**settings, **changed})


def pictures(count=48, width=6, classes=4):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, count)
    features = 3 * generator.normal(size=(count, width)) + labels[:, None] + 10
    return features.astype(np.float32), labels


def trained(features, labels, rates=RATES, rows=None, **changed):
    return train_heads(
        features,
        labels,
        np.arange(len(labels)) if rows is None else rows,
        standardise={name: Standardise(part, CPU) for name, part in features.items()},
        rates=dict.fromkeys(features, rates),
        recipe=recipe(**changed),
        advance=lambda: None,
    )


def trained_alone(features, labels, rate, plan):
    """A head and its optimizer as anyone would write them."""
    x = torch.from_numpy((features - features.mean(0)) / features.std(0))
    head = nn.Linear(features.shape[1], plan.num_classes)
    with torch.no_grad():
        first = Heads(Standardise(features, CPU), (rate,), plan)
        head.weight.copy_(first.weight_CN.T)
        head.bias.copy_(first.bias_N)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate * plan.batch_size / 256, momentum=0.9)
    steps = plan.epochs * len(labels) // plan.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for batch in plan.batches(np.arange(len(labels))):
        optimizer.zero_grad()
        F.cross_entropy(head(x[batch]), torch.from_numpy(labels[batch])).backward()
        optimizer.step()
        schedule.step()
    return head


@pytest.mark.parametrize("number", range(len(RATES)))
def test_a_head_of_the_grid_is_the_head_trained_alone_by_torch(number):
    features, labels = pictures()
    heads = trained({"x": features}, labels)["x"]
    alone = trained_alone(features, labels, RATES[number], recipe())
    weight_CRL = heads.weight_CN.unflatten(1, (len(RATES), 4))
    torch.testing.assert_close(weight_CRL[:, number], alone.weight.detach().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        heads.bias_N.view(len(RATES), 4)[number], alone.bias.detach(), rtol=1e-4, atol=1e-5
    )
    first = Heads(Standardise(features, CPU), RATES, recipe()).weight_CN.unflatten(1, (len(RATES), 4))
    assert (weight_CRL - first).abs().amax(dim=(0, 2)).min() > 1e-3, "nothing was learned"


def test_a_smaller_batch_steps_with_the_mean_of_its_own_gradients():
    features, labels = pictures(count=20)
    heads = trained({"x": features}, labels, epochs=1, batch_size=11, rates=(0.5,))["x"]
    batches = list(recipe(epochs=1, batch_size=11).batches(np.arange(20)))
    assert sorted(map(len, batches)) == [10, 10]
    x = torch.from_numpy((features - features.mean(0)) / features.std(0))
    plan = recipe(epochs=1, batch_size=11)
    weight = Heads(Standardise(features, CPU), (0.5,), plan).weight_CN.requires_grad_()
    momentum = torch.zeros_like(weight)
    bias, bias_momentum = torch.zeros(4, requires_grad=True), torch.zeros(4)
    for batch, decay in zip(batches, (1.0, 0.5), strict=True):
        loss = F.cross_entropy(x[batch] @ weight + bias, torch.from_numpy(labels[batch]))
        by_weight, by_bias = torch.autograd.grad(loss, [weight, bias])
        momentum, bias_momentum = 0.9 * momentum + by_weight, 0.9 * bias_momentum + by_bias
        with torch.no_grad():
            weight -= 0.5 * 11 / 256 * decay * momentum
            bias -= 0.5 * 11 / 256 * decay * bias_momentum
    torch.testing.assert_close(heads.weight_CN, weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heads.bias_N, bias.detach(), rtol=1e-5, atol=1e-7)


def test_every_epoch_shows_every_picture_once_in_a_new_order_and_no_batch_is_a_small_rest():
    rows = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144])
    plan = recipe(batch_size=4, epochs=2)
    batches = list(plan.batches(rows))
    assert [len(batch) for batch in batches] == [3, 3, 3] * 2 and plan.steps(9) == 6
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == rows.tolist() and first.tolist() != second.tolist()
    assert [len(batch) for batch in recipe(batch_size=100, epochs=1).batches(rows)] == [9]


@pytest.mark.parametrize(("precision", "rate"), [("fp32", 1e40), ("fp16", 1e7)])
def test_a_head_that_diverges_does_not_touch_the_others(precision, rate):
    features, labels = pictures()
    calm = trained({"x": features}, labels, rates=(0.01, 0.1), precision=precision)["x"]
    wild = trained({"x": features}, labels, rates=(0.01, rate, 0.1), precision=precision)["x"]
    weight_CRL = wild.weight_CN.unflatten(1, (3, 4))
    assert not weight_CRL[:, 1].isfinite().any()
    torch.testing.assert_close(weight_CRL[:, [0, 2]].flatten(1), calm.weight_CN, rtol=1e-5, atol=1e-6)


def test_the_heads_of_an_input_are_the_same_alone_and_in_company():
    features, labels = pictures()
    alone = trained({"x": features}, labels)["x"]
    beside = trained({"wide": np.repeat(features, 2, axis=1), "x": features}, labels)["x"]
    torch.testing.assert_close(beside.weight_CN, alone.weight_CN, rtol=0, atol=0)


def test_only_the_rows_that_are_given_are_seen():
    features, labels = pictures()
    rows = np.arange(0, 48, 2)
    other = features.copy()
    standardise = {"x": Standardise(features, CPU)}
    other[1::2] = 1e6
    results = [
        train_heads(
            {"x": part}, labels, rows, standardise=standardise, rates={"x": RATES}, recipe=recipe(),
            advance=lambda: None,
        )["x"].weight_CN
        for part in (features, other)
    ]  # fmt: skip
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_what_full_precision_learns(precision):
    features, labels = pictures(count=96)
    full = trained({"x": features}, labels)["x"]
    low = trained({"x": features}, labels, precision=precision)["x"]
    assert low.weight_CN.dtype == torch.float32 and low.logits(features).dtype == torch.float32
    difference = (low.weight_CN - full.weight_CN).norm() / full.weight_CN.norm()
    assert 0 < difference < 0.03


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_that_are_updated_in_parts_are_those_of_the_whole(monkeypatch, precision):
    features, labels = pictures()
    whole = trained({"x": features}, labels, precision=precision)["x"].weight_CN
    monkeypatch.setattr(linear_heads, "_WEIGHTS_PER_UPDATE", 2 * whole.shape[1] + 1)  # 2 of 6 channels
    parts = trained({"x": features}, labels, precision=precision)["x"].weight_CN
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [float, np.float64, np.float32])
def test_rates_of_any_float_leave_the_heads_in_float32(kind):
    features, labels = pictures()
    heads = trained({"x": features}, labels, rates=tuple(map(kind, RATES)))["x"]
    assert heads.weight_CN.dtype == heads._rate_N.dtype == torch.float32


def test_statistics_in_blocks_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(linear_heads, "_ROWS_PER_BLOCK", 7)
    features = np.random.default_rng(0).normal(size=(50, 5)) * [1, 10, 1e-3, 1e4, 1] + [0, 1000, 0, 0, -3]
    features = features.astype(np.float32)
    standardised = Standardise(features, CPU)(features).numpy()
    wide = features.astype(np.float64)
    np.testing.assert_allclose(standardised, (wide - wide.mean(0)) / wide.std(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_channel_that_is_constant_in_training_is_zero_everywhere(kind):
    features, _ = pictures()
    features = features.astype(kind)
    features[:, 2] = 0.1
    standardise = Standardise(features, CPU)
    assert not standardise(features)[:, 2].any()
    assert not standardise(features + 1)[:, 2].any()
    assert standardise(features)[:, [0, 1, 3, 4, 5]].std(dim=0).allclose(torch.ones(5), atol=0.05)


def test_features_are_left_as_they_are_and_no_global_state_moves():
    features, labels = pictures()
    before = features.copy(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = trained({"x": features}, labels)["x"].weight_CN
    again = trained({"x": features}, labels)["x"].weight_CN
    other = trained({"x": features}, labels, seed=6)["x"].weight_CN
    assert torch.equal(first, again) and not torch.equal(first, other)
    np.testing.assert_array_equal(features, before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])
