"""The loop with a network of one layer, whose every number can be computed by hand."""

import json
import math
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.scheduler import StepLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from dino.downstream.length import of_epochs
from dino.downstream.run_options import RunOptions
from dino.downstream.samples import Samples, create_loader
from dino.downstream.state import BEST_NAME
from dino.downstream.training import Task, Training
from dino.runtime import checkpoint, run_log
from dino.runtime.images import BrokenImageError
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted, RunStopped, UserError
from tests.dino.small_runs import Killed, assert_same
from tests.full_disk import full_disk

COUNT, BATCH = 8, 2


@pytest.fixture(autouse=True)
def no_pictures_of_numbers(monkeypatch):
    monkeypatch.setattr(run_log, "_tensorboard", lambda folder: None)
    monkeypatch.setattr("dino.downstream.training.draw_curves", lambda *_: None)


class Regression(nn.Module):
    """y = w x behind a batch norm, whose statistics a step changes too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, x):
        return self.layer(x) + 0 * self.norm(x) + 0 * torch.rand(1)


def read(index, *, broken=()):
    if index in broken:
        raise BrokenImageError(f"{index}.png", "empty file")
    return torch.tensor([float(index)]), torch.rand(1)


def stacked(samples):
    return tuple(torch.stack(part) for part in zip(*samples, strict=True))


def losses(network, content):
    x, noise = content
    return {"fit": (network(x) - 2 * x - noise).square().mean(), "size": network(x).mean() * 1e-3}


def create(
    folder, *, epochs=2, loss=losses, evaluate=None, decay=None, interruption=None, device="cpu", **changes
):
    folder.mkdir(exist_ok=True)
    network = Regression()
    options = RunOptions(output_dir=str(folder), device=device, save_every_minutes=0)
    settings = {key: changes.pop(key) for key in ("clip_grad", "val_every", "resume_from") if key in changes}
    pictures = changes.pop("pictures", read)
    batch = changes.pop("batch", BATCH)
    options = replace(options, **changes)
    length = of_epochs(COUNT, batch, epochs)
    samples = Samples(COUNT, pictures, seed=options.seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0)
    scheduler = StepLRScheduler(optimizer, decay_t=3, decay_rate=0.5, t_in_epochs=False)
    task = Task(
        network,
        losses=loss,
        evaluate=evaluate or (lambda network: {"good": float(network.layer.weight.detach())}),
        best_by="good",
        open_loader=partial(create_loader, samples, stacked, num_workers=0, pin_memory=False),
        facts={"classes": ["a"]},
    )
    return Training(
        task,
        optimizer,
        scheduler,
        length,
        options,
        interruption or Interruption(),
        device=torch.device(device),
        precision="fp32",
        num_workers=0,
        ema=ModelEmaV3(network, decay=decay) if decay else None,
        **settings,
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def content(folder, name=checkpoint.NAME):
    return checkpoint.load(folder / name)


def assert_same_run(folder, expected):
    found, wanted = content(folder), content(expected)
    del found["args"], wanted["args"]
    assert_same(found, wanted)
    assert rows(folder) == rows(expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "_tensorboard", lambda folder: None)
        patch.setattr("dino.downstream.training.draw_curves", lambda *_: None)
        create(folder, decay=0.9).run()
    return folder


def test_steps_are_those_of_a_plain_loop(tmp_path):
    training = create(tmp_path)
    order = [[index for _, index in batch] for batch in training.length.order_after(0, seed=0)]
    keys = [list(batch) for batch in training.length.order_after(0, seed=0)]
    samples = Samples(COUNT, read, seed=0)
    weight, velocity = 0.5, 0.0
    for step, batch in enumerate(order):
        x = torch.tensor([float(index) for index in batch])
        noise = torch.cat([samples[key][0][1] for key in keys[step]])
        gradient = float((2 * (weight * x - 2 * x - noise) * x).mean() + 1e-3 * x.mean())
        velocity = 0.9 * velocity + gradient
        weight -= 0.01 * 0.5 ** (step // 3) * velocity
    training.run()
    assert math.isclose(float(training.task.network.layer.weight.detach()), weight, rel_tol=1e-5)
    assert training.step == 8


def test_the_first_step_has_the_first_rate_and_each_step_its_own(tmp_path):
    """The original calls its schedule after an epoch, and so stays a whole epoch behind."""
    rates = []
    training = create(tmp_path)
    step = training.state.optimizer.step
    training.state.optimizer.step = lambda: (
        rates.append(training.state.optimizer.param_groups[0]["lr"]),
        step(),
    )
    training.run()
    assert rates == pytest.approx([0.01] * 3 + [0.005] * 3 + [0.0025] * 2)


def test_the_log_has_means_of_the_losses_and_what_was_measured(whole):
    first, second = rows(whole)
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert first["train_loss"] == pytest.approx(first["train_fit"] + first["train_size"])
    assert second["train_lr"] == pytest.approx(0.0025)
    assert {"good", "ema_good"} <= set(first) and first["skipped_steps"] == 0
    assert first["train_fit"] > second["train_fit"] > 0


def test_the_average_lags_behind_by_its_decay_and_is_evaluated(tmp_path):
    training = create(tmp_path, decay=0.75, epochs=1)
    weights = [0.5]
    step = training.state.optimizer.step
    training.state.optimizer.step = lambda: (
        step(),
        weights.append(float(training.task.network.layer.weight.detach())),
    )
    training.run()
    average = weights[0]
    for weight in weights[1:]:
        average = 0.75 * average + 0.25 * weight
    assert rows(tmp_path)[0]["ema_good"] == pytest.approx(average, rel=1e-6)
    assert content(tmp_path)["model_ema"]["layer.weight"].item() == pytest.approx(average, rel=1e-6)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_best_network_is_kept_whichever_it_is(tmp_path, decay):
    values = iter([3.0, 1.0, 2.0, 5.0] if decay else [3.0, 2.0])
    training = create(tmp_path, decay=decay, evaluate=lambda network: {"good": next(values)})
    training.run()
    best = content(tmp_path, BEST_NAME)
    assert best["classes"] == ["a"] and content(tmp_path)["progress"]["best"] == (5.0 if decay else 3.0)
    last = content(tmp_path)
    if decay:
        assert torch.equal(best["model"]["layer.weight"], last["model_ema"]["layer.weight"])
    else:
        assert not torch.equal(best["model"]["layer.weight"], last["model"]["layer.weight"])


@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_a_run_killed_at_any_step_ends_in_the_same_numbers_bit_for_bit(tmp_path, whole, number, monkeypatch):
    calls = iter(range(number))
    step = Training._take_step

    def cut(self, batch):
        if next(calls, None) is None:
            self.task.network.layer.weight.data.fill_(7)
            raise Killed
        step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "_take_step", cut)
        create(tmp_path, decay=0.9, save_every_minutes=1e-9).run()
    assert 0 < content(tmp_path)["progress"]["samples"] == number * BATCH
    create(tmp_path, decay=0.9).run()
    assert_same_run(tmp_path, whole)


def test_a_run_killed_while_it_is_evaluated_evaluates_again(tmp_path, whole):
    def killed(network):
        raise Killed

    with pytest.raises(Killed):
        create(tmp_path, decay=0.9, evaluate=killed).run()
    assert content(tmp_path)["progress"]["samples"] == COUNT and not rows(tmp_path)
    create(tmp_path, decay=0.9).run()
    assert_same_run(tmp_path, whole)


def test_a_signal_saves_and_the_same_command_continues(tmp_path, whole):
    def signalled(network, batch):
        signal.raise_signal(signal.SIGUSR1)
        return losses(network, batch)

    with Interruption() as interruption, pytest.raises(Interrupted, match="stopped by SIGUSR1 after 1 steps"):
        create(tmp_path, decay=0.9, loss=signalled, interruption=interruption).run()
    create(tmp_path, decay=0.9).run()
    assert_same_run(tmp_path, whole)


def test_a_longer_run_continues_a_finished_one_and_a_finished_one_says_so(tmp_path, capsys):
    create(tmp_path, epochs=1).run()
    create(tmp_path, epochs=1).run()
    assert "nothing to train" in capsys.readouterr().out
    create(tmp_path, epochs=2).run()
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]


def test_resume_names_a_checkpoint_elsewhere_that_the_folders_own_wins_over(tmp_path, whole):
    create(tmp_path / "one", epochs=1, decay=0.9).run()
    elsewhere = tmp_path / "one" / checkpoint.NAME
    training = create(tmp_path / "two", decay=0.9, resume_from=elsewhere)
    assert training.step == 4
    training.run()
    assert content(tmp_path / "two")["model"] == content(whole)["model"]
    with pytest.raises(UserError, match="no checkpoint at"):
        create(tmp_path / "three", resume_from=tmp_path / "nowhere.pth")


def test_a_file_of_the_original_counts_finished_epochs_from_0(tmp_path):
    create(tmp_path / "one", epochs=1).run()
    stored = content(tmp_path / "one")
    del stored["progress"]
    stored["epoch"] = 0
    checkpoint.save_atomically(stored, tmp_path / "original.pth")
    training = create(tmp_path / "two", resume_from=tmp_path / "original.pth")
    assert (training.step, training.place.rounds) == (4, 1)


def test_another_batch_goes_on_at_the_same_picture(tmp_path, capsys):
    create(tmp_path, epochs=1).run()
    training = create(tmp_path, epochs=3, batch=4)
    assert training.step == 2


def test_a_checkpoint_of_another_network_or_without_an_optimizer_is_refused_unchanged(tmp_path):
    create(tmp_path, epochs=1).run()
    stored = content(tmp_path)
    wider = {**stored, "model": {**stored["model"], "layer.weight": torch.zeros(2, 1)}}
    checkpoint.save_atomically(wider, tmp_path / checkpoint.NAME)
    with pytest.raises(UserError, match=r"1 tensors differ, first layer.weight \(file: 2x1, model: 1x1\)"):
        create(tmp_path)
    del stored["optimizer"]
    checkpoint.save_atomically(stored, tmp_path / checkpoint.NAME)
    with pytest.raises(UserError, match="the checkpoint has no optimizer, so no run can go on from it"):
        create(tmp_path)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, capsys):
    def poisoned(network, batch):
        found = losses(network, batch)
        return {**found, "fit": found["fit"] * math.nan} if len(seen) == 1 else found

    seen = []
    training = create(tmp_path, epochs=1, loss=poisoned)
    step = training._take_step

    def watched(batch):
        state = training.task.network.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        step(batch)
        seen.append(all(torch.equal(value, before[name]) for name, value in state.items()))

    training._take_step = watched
    training.run()
    assert seen == [False, True, False, False]
    row = rows(tmp_path)[0]
    assert row["skipped_steps"] == 1 and math.isfinite(row["train_loss"])
    assert "step 1: loss or gradients are not finite; the step is skipped" in capsys.readouterr().out


def test_many_such_steps_in_a_row_stop_the_run(tmp_path):
    def poisoned(network, batch):
        return {"fit": losses(network, batch)["fit"] * math.inf}

    with pytest.raises(RunStopped, match=r"10 steps in a row were not finite.* Lower --lr"):
        create(tmp_path, epochs=4, loss=poisoned).run()
    assert content(tmp_path)["model"]["layer.weight"].item() == 0.5


def test_clipping_limits_the_gradient_over_all_parameters(tmp_path):
    training = create(tmp_path, epochs=1, clip_grad=0.5)
    step = training.state.optimizer.step
    norms = []
    training.state.optimizer.step = lambda: (norms.append(abs(training._trained[0].grad.item())), step())
    training.run()
    assert norms == pytest.approx([0.5] * 4, rel=1e-4)


def test_only_every_so_manieth_round_and_the_last_are_evaluated(tmp_path):
    create(tmp_path, epochs=5, val_every=2).run()
    assert ["good" in row for row in rows(tmp_path)] == [False, True, False, True, True]


def test_broken_pictures_are_named_and_too_many_end_the_run(tmp_path, capsys):
    create(tmp_path, pictures=partial(read, broken=(3,)), max_broken=1).run()
    assert capsys.readouterr().out.count("broken picture skipped: 3.png: empty file") == 1
    with pytest.raises(UserError, match="2 broken pictures, --max_broken allows 1"):
        create(tmp_path, epochs=4, pictures=partial(read, broken=(3, 5)), max_broken=1).run()


def test_evaluation_leaves_the_networks_mode_and_gradients_alone(tmp_path):
    modes = []

    def evaluate(network):
        modes.append((network.training, torch.is_grad_enabled()))
        return {"good": 1.0}

    training = create(tmp_path, evaluate=evaluate, decay=0.5)
    training.task.network.norm.eval()
    training.run()
    assert modes == [(False, False)] * 4 and training.task.network.training


def test_a_full_disk_is_named_and_the_last_checkpoint_is_whole(tmp_path):
    create(tmp_path, epochs=1).run()
    before = content(tmp_path)
    with full_disk(1000), pytest.raises(UserError, match="cannot write"):
        create(tmp_path).run()
    assert_same(content(tmp_path), before)
    create(tmp_path).run()
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]
