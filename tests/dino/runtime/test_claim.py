"""Who has claimed a folder is another process: within one, such a lock is no obstacle."""

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dino.runtime.claim import NAME, claimed
from dino.runtime.options import UserError

_HOLD = """
import os, sys, time
from pathlib import Path
from dino.runtime.claim import claimed
with claimed(Path(sys.argv[1]), "--output_dir"):
    if len(sys.argv) > 2 and os.fork() == 0:  # as a loading process
        time.sleep(30)
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(tmp_path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline() == "claimed\n"
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_folder_in_use_is_refused_and_its_owner_named(holder, tmp_path):
    process = holder()
    with pytest.raises(UserError) as refusal, claimed(tmp_path, "--output_dir"):
        pass
    assert str(refusal.value) == (
        f"--output_dir {tmp_path} is in use by process {process.pid} on {platform.node()}: "
        "wait until that run ends, or name another folder"
    )
    process.communicate("\n")
    with claimed(tmp_path, "--output_dir"):
        pass


@pytest.mark.parametrize("arguments", [(), ("with a child",)])
def test_a_killed_owner_holds_nothing_even_while_its_children_live(arguments, holder, tmp_path):
    process = holder(*arguments)
    process.send_signal(signal.SIGKILL)
    while process.poll() is None:
        time.sleep(0.01)
    assert (tmp_path / NAME).exists()
    with claimed(tmp_path, "--output_dir"):
        assert (tmp_path / NAME).read_text() == f"process {os.getpid()} on {platform.node()}\n"


def test_a_second_claim_of_the_same_process_is_refused_and_harms_nothing(tmp_path):
    with claimed(tmp_path, "--output_dir"):
        with (
            pytest.raises(UserError, match="is in use by this very process"),
            claimed(tmp_path, "--output_dir"),
        ):
            pass
        assert (tmp_path / NAME).exists()
    with claimed(tmp_path, "--output_dir"):
        pass


def test_with_patience_the_end_of_the_owner_is_waited_for_and_that_is_said(holder, tmp_path, capsys):
    process = holder()
    threading.Timer(1.0, process.kill).start()
    with pytest.raises(UserError), claimed(tmp_path, "--output_dir"):
        pass
    with claimed(tmp_path, "--output_dir", patience=60):
        assert process.poll() is not None
    waiting = f"{tmp_path} is in use by process {process.pid} on {platform.node()}: waiting for its end"
    assert capsys.readouterr().out.count(waiting) == 1


def test_an_owner_that_ends_in_the_moment_of_the_refusal_is_no_traceback(holder, tmp_path, monkeypatch):
    holder()

    def gone(self, **_):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", gone)
    with pytest.raises(UserError, match="is in use by another process"), claimed(tmp_path, "--output_dir"):
        pass


def test_nothing_stays_behind(tmp_path):
    with pytest.raises(RuntimeError), claimed(tmp_path, "--output_dir"):
        raise RuntimeError("the run failed")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("dino.runtime.claim.fcntl.lockf", refuse)
    with claimed(tmp_path, "--output_dir"):
        assert (tmp_path / NAME).exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot write .*absent"),
        claimed(tmp_path / "absent", "--output_dir"),
    ):
        pass
