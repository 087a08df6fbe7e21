"""Checkpoints on disk: full disks, kills, damage."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino.runtime.checkpoint import NAME, PREVIOUS_NAME, load, load_latest, save_atomically, save_latest
from dino.runtime.options import UserError
from tests.dino.small_runs import Killed


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / NAME
    save_atomically({"step": 1}, file)

    def fill_the_disk(content, stream):
        stream.write(b"PK half of a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(UserError) as refusal:
        save_atomically({"step": 2}, file)
    assert str(refusal.value) == (
        f"cannot write {file}: [Errno 28] No space left on device; what was there before is unchanged"
    )
    monkeypatch.undo()
    assert load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


_REAL_ACCIDENTS = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from dino.runtime.checkpoint import NAME, load, load_latest, save_atomically, save_latest
from dino.runtime.options import UserError

folder = Path(sys.argv[1])
random.seed(0)

def content(step):
    return {"step": step, "weights": torch.full((300_000,), float(step))}

newest = 0
for attempt in range(10):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for step in range(newest + 1, newest + 10**6):
            save_latest(content(step), folder)
            os.write(writer, step.to_bytes(4, "little"))
    os.close(writer)
    last = int.from_bytes(os.read(reader, 4), "little")
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := os.read(reader, 4):
        last = int.from_bytes(told, "little")
    assert load(folder / NAME)["step"] <= last + 1
    found, note = load_latest(folder)
    assert note is None, note
    assert (found["weights"] == found["step"]).all()
    assert found["step"] in (last - 1, last, last + 1), (found["step"], last)
    newest = found["step"]

resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
before = load(folder / NAME)["step"]
try:
    save_atomically(content(0), folder / NAME)
except UserError as error:
    print(error)
assert load(folder / NAME)["step"] == before
print(sorted(os.listdir(folder)))
"""


@pytest.mark.slow
def test_kill_9_and_a_write_that_fails_half_way_lose_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _REAL_ACCIDENTS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout and "File too large" in done.stdout
    left = set(eval(done.stdout.splitlines()[-1]))
    # What the killed leave behind has one name each, and is overwritten by the next.
    assert left <= {NAME, PREVIOUS_NAME, f".{NAME}.fresh", f".{NAME}.fresh.tmp", f"..{NAME}.fresh.tmp"}


def two_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        save_latest({"step": step, "weights": torch.zeros(1000)}, folder)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x"]
)
def test_a_damaged_file_falls_back_to_the_one_before_and_says_so(damage, tmp_path):
    two_checkpoints(tmp_path)
    latest = tmp_path / NAME
    latest.write_bytes(damage(latest.read_bytes()))
    content, note = load_latest(tmp_path)
    assert content["step"] == 1
    assert note.startswith(str(latest)) and note.endswith(f"; resuming from {PREVIOUS_NAME}")
    (tmp_path / PREVIOUS_NAME).write_bytes(b"")
    with pytest.raises(UserError, match=f"{NAME}.*{PREVIOUS_NAME}.*; move it away to start anew$"):
        load_latest(tmp_path)


def killed_before_the_last_rename(folder: Path, monkeypatch) -> None:
    """Saves step 3, all but the rename that puts it in its place."""
    rename = Path.replace

    def replace(self, target):
        if self.name == f".{NAME}.fresh":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", replace)
        save_latest({"step": 3}, folder)


def test_a_kill_while_files_change_places_leaves_a_whole_checkpoint_under_its_name(tmp_path, monkeypatch):
    two_checkpoints(tmp_path)
    killed_before_the_last_rename(tmp_path, monkeypatch)
    assert load(tmp_path / NAME)["step"] == load(tmp_path / PREVIOUS_NAME)["step"] == 2
    (tmp_path / NAME).write_bytes(b"")  # one file of two names: both are damaged
    content, note = load_latest(tmp_path)
    assert content["step"] == 3 and note.endswith(f"; resuming from .{NAME}.fresh")
    save_latest({"step": 4}, tmp_path)
    assert load(tmp_path / NAME)["step"] == 4


def test_without_hard_links_files_change_places_by_renaming_and_nothing_is_lost(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    two_checkpoints(tmp_path)
    assert [load(tmp_path / name)["step"] for name in (PREVIOUS_NAME, NAME)] == [1, 2]
    killed_before_the_last_rename(tmp_path, monkeypatch)
    content, note = load_latest(tmp_path)
    assert not (tmp_path / NAME).exists() and content["step"] == 3 and note is None
    save_latest({"step": 4}, tmp_path)
    assert [load(tmp_path / name)["step"] for name in (PREVIOUS_NAME, NAME)] == [2, 4]


def test_without_the_last_file_the_one_before_is_resumed_and_said_to_be(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / NAME).unlink()
    content, note = load_latest(tmp_path)
    assert content["step"] == 1
    assert note == (
        f"there is no {tmp_path / NAME}; to start anew remove {PREVIOUS_NAME} too; resuming from {PREVIOUS_NAME}"
    )


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
    assert load_latest(tmp_path) == (None, None)
    with pytest.raises(UserError, match=r"^no checkpoint at "):
        load(tmp_path / NAME)


class Innocent:
    pass


def test_a_file_with_code_is_refused(tmp_path):
    torch.save({"args": Innocent()}, tmp_path / NAME)
    with pytest.raises(UserError, match="could run code"):
        load(tmp_path / NAME)
