import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch.nn import functional as F

from dino.evaluation import linear_grid, linear_heads
from dino.evaluation.linear_grid import RATES, grid_accuracy
from dino.evaluation.linear_heads import Heads, Recipe, Standardise
from dino.evaluation.splits import hold_out
from dino.runtime.options import UserError

CPU = torch.device("cpu")


def clusters(count, seed, classes=6, width=5, distance=1.0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = distance * np.random.default_rng(99).normal(size=(classes, width))
    return (centres[labels] + generator.normal(size=(count, width))).astype(np.float32), labels


def grid(train, train_labels, test, test_labels, **changed):
    """`grid_accuracy` of one input, quick."""
    settings = {
        "num_classes": 6,
        "epochs": 8,
        "batch_size": 32,
        "device": CPU,
        "precision": "fp32",
        "seed": 0,
    }
    train, test = ({"x": part} if isinstance(part, np.ndarray) else part for part in (train, test))
    return grid_accuracy(train, train_labels, test, test_labels, **{**settings, **changed})


def descent(x, labels, rate, seed, epochs):
    """Weights (C, L) and bias (L,) after descent on all pictures at once; `x` is standardised."""
    plan = Recipe(6, epochs, 500, CPU, "fp32", seed)
    weight = Heads(Standardise(x.numpy(), CPU), (rate,), plan).weight_CN.clone().requires_grad_()
    bias = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=rate * 500 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(x @ weight + bias, torch.from_numpy(labels)).backward()
        optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()


def test_choice_and_result_are_those_of_separate_trainings_by_torch():
    train, train_labels = clusters(120, seed=0)
    test, test_labels = clusters(70, seed=1)
    rates = (0.001, 0.05, 2.0)
    found = grid(train, train_labels, test, test_labels, rates=rates, epochs=15, batch_size=500)
    x, y = (torch.from_numpy((part - train.mean(0)) / train.std(0)) for part in (train, test))
    fitted, held_out = hold_out(train_labels, 0)
    scores = []
    for rate in rates:
        weight, bias = descent(x[fitted], train_labels[fitted], rate, 0, 15)
        answers = (x[held_out] @ weight + bias).argmax(dim=1).numpy()
        scores.append(100 * (answers == train_labels[held_out]).mean())
    best = int(np.argmax(scores))
    weight, bias = descent(x, train_labels, rates[best], 0, 15)
    logits = (y @ weight + bias).numpy()
    result = found["x"]
    assert (result.chosen, result.chosen_name) == (rates[best], "lr") and len(set(scores)) > 1
    assert result.held_out == pytest.approx(scores[best])
    np.testing.assert_array_equal(result.predictions, logits.argmax(axis=1))
    assert result.top1 == pytest.approx(100 * (logits.argmax(axis=1) == test_labels).mean())
    assert result.top5 == pytest.approx(100 * top_k_accuracy_score(test_labels, logits, k=5))
    assert result.balanced == pytest.approx(100 * balanced_accuracy_score(test_labels, result.predictions))


def test_the_grid_has_three_rates_a_decade_from_a_ten_thousandth_to_one():
    assert len(RATES) == 13 and RATES[0] == 1e-4 and RATES[-1] == 1
    np.testing.assert_allclose(np.diff(np.log10(RATES)), 1 / 3)


def test_the_test_set_has_no_part_in_the_choice():
    train, labels = clusters(150, seed=0)
    wide = np.concatenate([train, np.random.default_rng(1).normal(size=(150, 30))], axis=1)
    both = {"x": train, "wide": wide}
    seen = grid(both, labels, both, labels)
    unseen = grid(both, labels, {name: -part[:7] for name, part in both.items()}, (labels[:7] + 1) % 6)
    for name in both:
        a, b = seen[name], unseen[name]
        assert (a.chosen, a.held_out, a.at_edge) == (b.chosen, b.held_out, b.at_edge)
    assert seen["x"].top1 > unseen["x"].top1


def test_held_out_pictures_tell_features_from_noise_and_equal_inputs_have_equal_results():
    train, labels = clusters(200, seed=0)
    noise = np.random.default_rng(1).normal(size=train.shape)
    inputs = {"noise": noise, "b": train, "a": train}
    found = grid(inputs, labels, inputs, labels)
    assert list(found) == ["noise", "b", "a"]
    assert found["noise"].held_out < found["a"].held_out == found["b"].held_out


def test_an_input_has_the_same_result_alone_and_in_company():
    train, labels = clusters(100, seed=0)
    alone = grid(train, labels, train, labels)["x"]
    company = {"wide": np.repeat(train, 2, axis=1), "x": train}
    beside = grid(company, labels, company, labels)["x"]
    assert (alone.chosen, alone.held_out, alone.top1) == (beside.chosen, beside.held_out, beside.top1)
    np.testing.assert_array_equal(alone.predictions, beside.predictions)


def test_one_picture_per_class_leaves_the_middle_rate_and_says_that_nothing_was_held_out():
    features = 4 * np.eye(6, dtype=np.float32)
    found = grid(features, np.arange(6), features, np.arange(6), epochs=60)
    result = found["x"]
    assert (result.chosen, result.held_out, result.at_edge) == (RATES[6], None, False)
    assert result.top1 == 100


def test_a_rate_at_the_edge_of_the_grid_is_said_to_be_there():
    train, labels = clusters(300, seed=0, distance=3)
    high = grid(train, labels, train, labels, rates=(1e-7, 1e-6, 0.05), epochs=2)["x"]
    assert high.at_edge and high.chosen == 0.05
    inside = grid(train, labels, train, labels, rates=(1e-7, 0.3, 1e40), epochs=2)["x"]
    assert not inside.at_edge and inside.chosen == 0.3


def test_a_head_that_diverges_is_never_chosen_and_harms_no_other():
    train, labels = clusters(100, seed=0)
    calm = grid(train, labels, train, labels, rates=(0.01, 0.1))["x"]
    wild = grid(train, labels, train, labels, rates=(0.01, 1e40, 0.1, 1e39))["x"]
    assert (wild.chosen, wild.held_out) == (calm.chosen, calm.held_out)
    np.testing.assert_array_equal(wild.predictions, calm.predictions)


@pytest.mark.parametrize("labels", [np.arange(60) % 6, np.arange(60)])
@pytest.mark.parametrize(("precision", "rate"), [("fp32", 1e40), ("fp16", 1e8)])
def test_heads_that_all_diverge_are_an_error_in_a_sentence(labels, precision, rate):
    train, _ = clusters(60, seed=0)
    with pytest.raises(UserError, match=r"the linear heads did not stay finite .* try lower learning rates"):
        grid(train, labels, train, labels, rates=(rate,), num_classes=60, precision=precision)


def test_two_classes_and_one_picture_to_test_on_are_enough():
    train, labels = clusters(60, seed=0, classes=2)
    train += 10 * labels[:, None]
    result = grid(train, labels, train[:1], labels[:1], num_classes=2)["x"]
    assert (result.top1, result.balanced, result.top5) == (100, 100, None)
    assert result.predictions.dtype == np.int64


def test_fifteen_hundred_classes_are_trained():
    features = np.random.default_rng(0).normal(size=(3000, 12)).astype(np.float32)
    labels = np.arange(3000) % 1500
    features[1500:] = features[:1500]
    result = grid(
        features, labels, features[:99], labels[:99], num_classes=1500, rates=(0.1, 10, 1000), epochs=3
    )["x"]
    assert result.top5 > result.top1 > 10


def test_a_class_unseen_in_training_is_wrong_and_a_constant_channel_does_no_harm():
    train, labels = clusters(100, seed=0, classes=5)
    train[:, 0] = 4
    result = grid(train, labels, train[:4], np.array([5, 5, 5, 5]))["x"]
    assert result.top1 == result.top5 == result.balanced == 0
    plain = grid(train[:, 1:], labels, train[:4, 1:], labels[:4])["x"]
    assert plain.held_out > 40


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_memory_map_gives_what_the_array_gives(kind, tmp_path):
    train, labels = clusters(100, seed=0)
    train = train.astype(kind)
    mapped = np.memmap(tmp_path / "features", kind, "w+", shape=train.shape)
    mapped[:] = train
    mapped.flush()
    read = np.memmap(tmp_path / "features", kind, "r", shape=train.shape)
    from_map = grid(read, labels, read, labels)["x"]
    wide = train.astype(np.float32)
    from_array = grid(wide, labels, wide, labels)["x"]
    assert (from_map.chosen, from_map.held_out) == (from_array.chosen, from_array.held_out)
    np.testing.assert_array_equal(from_map.predictions, from_array.predictions)


class Watched(np.ndarray):
    """Features that refuse to be converted as a whole."""

    def astype(self, *arguments, **named):
        assert len(self) <= 20
        return super().astype(*arguments, **named)


def test_features_are_never_converted_as_a_whole(monkeypatch):
    monkeypatch.setattr(linear_heads, "_ROWS_PER_BLOCK", 20)
    monkeypatch.setattr(linear_grid, "_ROWS_PER_BLOCK", 20)
    train, labels = clusters(200, seed=0)
    watched = train.astype(np.float16).view(Watched)
    plain = grid(train.astype(np.float16), labels, train.astype(np.float16), labels, batch_size=20)
    blocks = grid(watched, labels, watched, labels, batch_size=20)
    np.testing.assert_array_equal(blocks["x"].predictions, plain["x"].predictions)


def test_results_depend_on_the_seed_alone_and_no_global_state_moves():
    train, labels = clusters(100, seed=0, distance=0.3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), train.copy()
    first, again, other = (grid(train, labels, train, labels, seed=seed)["x"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.predictions, again.predictions)
    assert (first.chosen, first.held_out) == (again.chosen, again.held_out)
    assert (first.predictions != other.predictions).any()
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    np.testing.assert_array_equal(train, before[2])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_scores_as_full_precision_does(precision):
    train, labels = clusters(300, seed=0, distance=2)
    full = grid(train, labels, train, labels)["x"]
    low = grid(train, labels, train, labels, precision=precision)["x"]
    assert low.top1 == pytest.approx(full.top1, abs=2)


def test_unsigned_bytes_serve_as_labels():
    train, labels = clusters(60, seed=0)
    a, b = (grid(train, kind, train, kind)["x"] for kind in (labels, labels.astype(np.uint8)))
    np.testing.assert_array_equal(a.predictions, b.predictions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": np.zeros(9, dtype=int)}, "all of one class; a linear probe needs"),
        ({"test": np.ones((9, 4), np.float32)}, "training features are 5 wide and the test features 4"),
        ({"train": np.full((9, 5), np.nan, np.float16)}, "features of 9 pictures are not finite"),
        ({"rates": ()}, "learning rates must be above 0, got none"),
        ({"rates": (0.1, 0.0)}, "learning rates must be above 0, got 0.1, 0.0"),
        ({"epochs": 0}, "epochs and batch size must be 1 or more, got 0 and 32"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(change, message):
    features, labels = clusters(9, seed=0)
    arguments = {"train": features, "train_labels": labels, "test": features, "test_labels": labels, **change}
    with pytest.raises(UserError, match=message):
        grid(**arguments)


def test_labels_beyond_the_classes_are_refused():
    features, labels = clusters(20, seed=0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 0 to 5"):
        grid(features, labels, features, labels, num_classes=3)


def test_inputs_are_the_same_in_training_and_test():
    features, labels = clusters(9, seed=0)
    with pytest.raises(ValueError, match=r"the same inputs to train and to test on, got \['a'\] and \['b'\]"):
        grid({"a": features}, labels, {"b": features}, labels)


def test_the_bar_reaches_its_end(capsys):
    features, labels = clusters(60, seed=0)
    grid(features, labels, features, labels, progress="linear", epochs=3)
    text = capsys.readouterr().err
    assert "linear: 100%" in text and "12/12" in text  # 2 batches for 48 and for 60 pictures, 3 epochs
