"""What a step did, read later than it was done; and that a run in which it is ends the same."""

import math

import pytest
import torch

from dino import pretraining
from dino.pretraining import pretrain
from dino.runtime.options import RunStopped
from dino.step_result import StepResult, UnreadResults
from tests.dino.small_runs import assert_same_run, load, rows, run_until_killed, tiny


def result(loss=1.5, finite=True):
    return StepResult({"loss": torch.tensor(loss), "kl": torch.tensor(0.25)}, torch.tensor(finite))


@pytest.fixture
def read_later(monkeypatch, quick):
    """As on a GPU."""
    monkeypatch.setattr(pretraining, "UnreadResults", lambda lag: UnreadResults(1))


@pytest.mark.parametrize("finite", [True, False])
def test_a_result_tells_the_measures_by_name_and_whether_the_step_was_taken(finite):
    loss = 1.5 if finite else math.nan
    found = result(loss, finite)
    assert found.finite is finite
    assert found.measures == pytest.approx({"loss": loss, "kl": 0.25}, nan_ok=True)


def test_a_result_is_that_of_its_step_whatever_comes_after():
    loss, finite = torch.tensor(2.0), torch.tensor(True)
    found = StepResult({"loss": loss}, finite)
    loss.zero_(), finite.logical_not_()
    assert found.finite and found.measures == {"loss": 2.0}


@pytest.mark.parametrize(("lag", "read"), [(0, [[0], [1], [2]]), (1, [[], [0], [1]]), (2, [[], [], [0]])])
def test_so_many_wait_and_the_oldest_is_read_first(lag, read):
    unread = UnreadResults(lag)
    taken = []
    for step in range(3):
        unread.add(step, result(float(step)))
        taken.append([number for number, _ in unread.due(all_of_them=False)])
    assert taken == read
    assert [each.measures["loss"] for each in unread] == list(range(3 - lag, 3))
    assert [number for number, _ in unread.due(all_of_them=True)] == list(range(3 - lag, 3))
    assert not list(unread)


def test_a_run_that_reads_later_ends_the_same(tmp_path, pictures, finished, read_later):
    pretrain(tiny(pictures, tmp_path))
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("killed", [2, 4, 7])
def test_a_killed_run_that_reads_later_ends_the_same(killed, tmp_path, pictures, finished, read_later):
    options = tiny(pictures, tmp_path, save_every_minutes=1e-9)
    run_until_killed(options, killed)
    pretrain(options)
    assert_same_run(tmp_path, finished)


def test_what_is_saved_holds_the_steps_that_are_not_read(tmp_path, pictures, read_later):
    run_until_killed(tiny(pictures, tmp_path, save_every_minutes=1e-9, knn_freq=0), 3)
    progress = load(tmp_path)["progress"]
    assert (progress["samples"], progress["totals"]["steps"]) == (12, 3)


def test_steps_that_are_not_finite_stop_the_run_one_step_later_at_the_same_module(
    tmp_path, pictures, monkeypatch, capsys, read_later
):
    def poisoned(*arguments):
        parts = create(*arguments)
        parts.student.backbone.blocks[1].mlp.fc1.weight.data[0] = math.nan
        return parts

    create = pretraining.create_distillation
    monkeypatch.setattr(pretraining, "create_distillation", poisoned)
    monkeypatch.setattr(pretraining, "_NONFINITE_STEPS_ALLOWED", 6)
    with pytest.raises(RunStopped, match=r"6 steps in a row were not finite, the last is step 5 ") as stopped:
        pretrain(tiny(pictures, tmp_path, knn_freq=0))
    assert "is backbone.blocks.1.mlp.fc1;" in str(stopped.value)
    assert capsys.readouterr().out.count("not finite; the step is skipped") == 6
    assert load(tmp_path)["progress"]["totals"] == {"steps": 0.0, "skipped": 3.0}
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [4]
