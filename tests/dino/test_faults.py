"""What happens to a run, in one process or in two, when something goes wrong around it; see docs/reliability.md."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from dino import pretraining
from dino.distillation import SelfDistillation
from dino.evaluation.extraction import Extractor
from dino.pretraining import pretrain
from dino.runtime import distributed
from dino.runtime.options import Interrupted, RankFailed, UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import assert_same_run, load, rows, tiny, write_pictures
from tests.two_processes import both_finish

pytestmark = pytest.mark.usefixtures("quick")


@contextmanager
def before_step(number, act):
    """Call `act` before the step of this number, counted from 0."""
    step, calls = SelfDistillation.step, iter(range(1000))

    def acting(self, views, rates):
        if next(calls) == number:
            act()
        return step(self, views, rates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfDistillation, "step", acting)
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step_and_asks_for_a_requeue(number, tmp_path, pictures, finished):
    sentence = (
        f"stopped by {number.name} after 3 steps, which are saved in {tmp_path}; the same command continues"
    )
    with before_step(2, lambda: signal.raise_signal(number)), pytest.raises(Interrupted) as stopped:
        pretrain(tiny(pictures, tmp_path))
    assert str(stopped.value) == sentence
    assert stopped.value.exit_code == os.EX_TEMPFAIL
    assert load(tmp_path)["progress"]["samples"] == 12
    pretrain(tiny(pictures, tmp_path))
    assert_same_run(tmp_path, finished)


def test_a_signal_during_a_look_is_answered_and_the_look_is_made_up_for(
    tmp_path, pictures, finished, monkeypatch
):
    fill, calls = Extractor.fill, iter(range(100))

    def interrupted(self, *arguments, **settings):
        if next(calls) == 1:  # after the first epoch
            signal.raise_signal(signal.SIGTERM)
        return fill(self, *arguments, **settings)

    monkeypatch.setattr(Extractor, "fill", interrupted)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after 4 steps, which are saved"):
        pretrain(tiny(pictures, tmp_path))
    assert load(tmp_path)["progress"]["samples"] == 16
    pretrain(tiny(pictures, tmp_path))
    assert_same_run(tmp_path, finished)


def test_a_signal_before_the_first_step_loses_nothing(tmp_path, pictures, finished, monkeypatch):
    fill = Extractor.fill

    def interrupted(self, *arguments, **settings):
        signal.raise_signal(signal.SIGUSR1)
        return fill(self, *arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGUSR1 after 0 steps"):
        patch.setattr(Extractor, "fill", interrupted)
        pretrain(tiny(pictures, tmp_path))
    pretrain(tiny(pictures, tmp_path))
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten"])
def test_a_damaged_last_checkpoint_costs_the_steps_since_the_one_before(
    damage, tmp_path, pictures, finished, capsys
):
    with before_step(5, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        pretrain(tiny(pictures, tmp_path, save_every_minutes=1e-9))
    last = tmp_path / "checkpoint.pth"
    content = last.read_bytes()
    middle = len(content) // 2
    last.write_bytes(
        {
            "cut": content[:middle],
            "emptied": b"",
            "overwritten": content[:middle] + bytes(4096) + content[middle + 4096 :],
        }[damage]
    )
    pretrain(tiny(pictures, tmp_path))
    assert f"{last}" in (out := capsys.readouterr().out) and "; resuming from checkpoint.previous.pth" in out
    assert_same_run(tmp_path, finished)


def test_a_picture_that_vanishes_is_named_and_another_stands_in(tmp_path, pictures, capsys):
    folder = write_pictures(tmp_path / "pictures")
    gone = [folder / "cats" / f"{index}.png" for index in range(8)]
    with before_step(1, lambda: [path.unlink() for path in gone]):
        pretrain(tiny(folder, tmp_path / "run", knn_freq=0))
    out = capsys.readouterr().out
    assert any(f"broken picture skipped: {path}: no such file or directory" in out for path in gone)
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == [0, 0]


@pytest.mark.slow
def test_a_loading_process_that_is_killed_costs_no_picture(tmp_path, pictures, finished, monkeypatch, capsys):
    marker = tmp_path / "killed"

    def fragile(data_path, **settings):
        opened = open_pictures(data_path, **settings)
        picture, deadly = opened.picture, 5

        def dying(index, **wishes):
            if index == deadly and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return picture(index, **wishes)

        opened.picture = dying
        return opened

    monkeypatch.setattr(pretraining, "open_pictures", fragile)
    monkeypatch.setattr(distributed, "share_cores", lambda device, asked: 1)
    monkeypatch.setattr(pretraining.Pretraining, "_look", lambda self, epochs: {})
    pretrain(tiny(pictures, tmp_path / "run"))
    assert "a loading process was killed (by the system, when no memory is left)" in capsys.readouterr().out
    found, expected = load(tmp_path / "run"), load(finished)
    for name, value in expected["teacher"].items():
        assert found["teacher"][name].equal(value), name


def test_too_little_memory_ends_with_the_last_checkpoint_whole(tmp_path, pictures, finished):
    def fail():
        raise MemoryError

    options = tiny(pictures, tmp_path, save_every_minutes=1e-9)
    with before_step(3, fail), pytest.raises(RankFailed, match="too little memory for 4 pictures at once"):
        pretrain(options)
    assert load(tmp_path)["progress"]["samples"] == 12
    pretrain(tiny(pictures, tmp_path))
    assert_same_run(tmp_path, finished)


_HOLD = """
import sys
from pathlib import Path
from dino.runtime.claim import claimed
with claimed(Path(sys.argv[1]), "--output_dir"):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_which_a_run_lives_is_refused_and_left_as_it_is(tmp_path, pictures):
    owner = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match=rf"{tmp_path} is in use by process {owner.pid} on "):
            pretrain(tiny(pictures, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == [".in_use"]
    finally:
        owner.communicate()


_NAN_IN_ONE = """
import os, sys
import torch
from dino.distillation import SelfDistillation
from dino.evaluation.extraction import Extractor
from dino.pretraining import pretrain
from dino.runtime.options import RunStopped
from tests.dino.small_runs import tiny

step, calls = SelfDistillation.step, iter(range(100))
rank = int(os.environ["RANK"])

def poisoned(self, views, rates):
    if next(calls) >= 2 and rank == 1:
        views[1][0] = float("nan")
    return step(self, views, rates)

SelfDistillation.step = poisoned
try:
    pretrain(tiny(sys.argv[1], sys.argv[2], batch_size=8, epochs=8, knn_freq=0))
except (RunStopped, SystemExit) as stop:
    print("DONE", rank, getattr(stop, "code", 1), stop)
"""


@pytest.mark.slow
def test_what_is_not_a_number_in_one_process_is_skipped_by_all_and_that_process_is_named(tmp_path, pictures):
    said = both_finish(_NAN_IN_ONE, pictures, tmp_path)
    assert "step 2: loss or gradients are not finite; the step is skipped" in said[0]
    assert "10 steps in a row were not finite, the last is step 11" in said[0]
    assert "whose output is not finite is backbone.patch_embed.proj.0.0 in process 1;" in said[0]
    content = load(tmp_path)
    assert 16 * content["epoch"] + content["progress"]["samples"] == 12 * 8
    assert all(value.isfinite().all() for value in content["student"].values())
