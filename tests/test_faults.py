"""Real processes that are killed, stopped, cut off or out of room; see docs/reliability.md.

What is lost is measured: every run here is continued and compared with one that nothing disturbed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dino.pretraining import pretrain
from dino.runtime import checkpoint, distributed
from dino.runtime.claim import NAME as CLAIM
from dino.runtime.claim import claimed
from tests.dino.small_runs import TINY, assert_same_run, load, rows, write_pictures
from tests.test_commands import flags, run, start
from tests.two_processes import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc: Linux only"),
]

# SGD without drop path: no masks that depend on the number of processes, no step that magnifies rounding.
OPTIONS = {
    **TINY,
    "batch_size": 8,
    "epochs": 4,
    "warmup_epochs": 1,
    "knn_freq": 0,
    "saveckp_freq": 0,
    "drop_path_rate": 0.0,
    "optimizer": "sgd",
    "lr": 0.1,
    "save_every_minutes": 1e-9,  # after every step
    "wait_minutes": 1,
}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), count=24)


def train_flags(pictures, folder, **changes):
    return ("-m", "dino.train", *flags(**{**OPTIONS, **changes}, data_path=pictures, output_dir=folder))


def torchrun(pictures, folder, *, restarts=0, **changes):
    address = ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}")
    return (*TORCHRUN, *address, f"--max_restarts={restarts}", *train_flags(pictures, folder, **changes))


@pytest.fixture(scope="module")
def straight_two(tmp_path_factory, pictures):
    """Two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight") / "two"
    run(*torchrun(pictures, folder))
    return folder


@pytest.fixture(scope="module")
def straight_one(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("straight") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "usable_cores", lambda: 1)
        pretrain(_options(pictures, folder))
    return folder


def _options(pictures, folder):
    from dino.train_options import TrainOptions

    return TrainOptions(**OPTIONS, data_path=str(pictures), output_dir=str(folder))


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def wait_for_epoch(folder, process):
    """One epoch of four is over."""
    wait_for(lambda: (folder / "log.txt").exists() and len(rows(folder)) >= 1, process)


def workers(process):
    """The pids of the training processes of a torchrun, the main one first."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = int(re.search(r"PPid:\s*(\d+)", status.read_text())[1])
            if parent == process.pid:
                environment = (status.parent / "environ").read_bytes().split(b"\0")
                ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
                found |= {rank: int(status.parent.name) for rank in ranks}
        except OSError:  # it has ended meanwhile
            continue
    return [found[rank] for rank in sorted(found)]


def finish(process, seconds=120):
    """Exit code and what was said on both streams."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def assert_close_run(folder, expected, atol=1e-5):
    """The same training up to rounding, which differs with the number of processes and grows with the steps."""
    found, wanted = load(folder), load(expected)
    for part in ("student", "teacher"):
        for name, value in wanted[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=0, atol=atol, msg=f"{part} {name}")
    torch.testing.assert_close(found["dino_loss"], wanted["dino_loss"], rtol=0, atol=atol)
    for row, other in zip(rows(folder), rows(expected), strict=True):
        for name in ("train_loss", "kl", "teacher_entropy", "train_lr", "momentum", "skipped_steps"):
            assert row[name] == pytest.approx(other[name], abs=atol), (row["epoch"], name)


def test_two_processes_train_what_one_trains(straight_two, straight_one):
    assert len(rows(straight_one)) == 4
    assert_close_run(straight_two, straight_one)


def test_torchrun_restarts_after_a_killed_worker_and_the_run_goes_on_by_itself(
    pictures, tmp_path, straight_two
):
    process = start(*torchrun(pictures, tmp_path, restarts=1))
    wait_for_epoch(tmp_path, process)
    os.kill(workers(process)[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert "restarted: by torchrun, 1 of at most 1 times" in out
    done = re.findall(rf"resumed:   {tmp_path} after (\d) epochs(?: and (\d+) pictures)?", out)
    assert len(done) == 1 and int(done[0][0]) >= 1
    assert_same_run(tmp_path, straight_two)


def test_without_restarts_a_killed_worker_ends_all_with_its_cause_and_one_process_can_finish(
    pictures, tmp_path, straight_one
):
    process = start(*torchrun(pictures, tmp_path))
    wait_for_epoch(tmp_path, process)
    began = time.monotonic()
    os.kill(workers(process)[0], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1
    assert time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL) received" in err
    assert "process 1 of 2 on" in err and "lost another process, which has ended" in err
    out, _ = run(*train_flags(pictures, tmp_path))
    assert f"resumed:   {tmp_path} after " in out
    assert_close_run(tmp_path, straight_one)


def test_all_killed_at_once_lose_nothing_but_the_steps_since_the_last_checkpoint(
    pictures, tmp_path, straight_two
):
    process = start(*torchrun(pictures, tmp_path), start_new_session=True)
    wait_for_epoch(tmp_path, process)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in workers(process):
        os.kill(pid, signal.SIGKILL)
    finish(process)
    run(*torchrun(pictures, tmp_path))
    assert_same_run(tmp_path, straight_two)


@pytest.mark.parametrize("receiver", ["one worker", "torchrun"])
def test_a_signal_to_one_stops_all_after_the_same_step_and_nothing_is_lost(
    receiver, pictures, tmp_path, straight_two
):
    options = torchrun(pictures, tmp_path, save_every_minutes=0)
    process = start(*options)
    wait_for_epoch(tmp_path, process)
    if receiver == "torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(workers(process)[1], signal.SIGUSR1)
    code, _, err = finish(process)
    assert code != 0
    name = "SIGTERM" if receiver == "torchrun" else "SIGUSR1"
    (steps,) = re.findall(rf"stopped by {name} after (\d+) steps, which are saved in", err)
    if receiver == "one worker":
        assert re.search(r"exitcode\s*: 75", err), err
    progress = load(tmp_path)["progress"]["samples"] + 48 * load(tmp_path)["epoch"]
    assert progress == 8 * int(steps)
    run(*options)
    assert_same_run(tmp_path, straight_two)


def test_one_process_asks_its_scheduler_for_a_requeue(pictures, tmp_path):
    process = start(*train_flags(pictures, tmp_path, save_every_minutes=0))
    wait_for_epoch(tmp_path, process)
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 75
    assert re.fullmatch(
        r"python -m dino.train: stopped by SIGUSR1 after \d+ steps, which are saved in .*; "
        r"the same command continues\n",
        err.splitlines(keepends=True)[-1],
    )


def test_a_process_that_hangs_is_given_up_after_the_timeout(pictures, tmp_path):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}
    both = [
        subprocess.Popen(
            [sys.executable, *train_flags(pictures, tmp_path, wait_minutes=0.1)],
            env={**os.environ, **environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        wait_for_epoch(tmp_path, both[0])
        both[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        code, _, err = finish(both[0])
        assert code == 1
        assert "process 0 of 2 on" in err and "waited 0.1 minutes for the others in vain" in err
        assert time.monotonic() - began < 60
    finally:
        both[1].kill()
        both[1].communicate()
    assert checkpoint.load_latest(tmp_path)[0]["epoch"] >= 1


def test_a_second_run_in_the_folder_of_a_live_one_is_refused(pictures, tmp_path):
    process = start(*train_flags(pictures, tmp_path, epochs=500))
    try:
        wait_for_epoch(tmp_path, process)
        _, err = run(*train_flags(pictures, tmp_path), code=2)
        assert f"--output_dir {tmp_path} is in use by process {process.pid} on " in err
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / CLAIM).exists(), "killed, it could not tidy up"
    with claimed(tmp_path, "--output_dir"):
        pass  # and nobody minds


_SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {folder} || exit 33
{train}
echo "code $?"
cp {folder}/checkpoint.pth {folder}/log.txt {outside}
mount -o remount,size=500m {folder}
{train}
echo "code $?"
cp {folder}/checkpoint.pth {folder}/log.txt {outside}
"""


def test_a_full_disk_is_named_the_last_checkpoint_is_whole_and_with_room_the_run_goes_on(
    pictures, tmp_path, straight_one
):
    unshare = shutil.which("unshare")
    if not unshare or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a small disk is mounted in a namespace of its own, which is not permitted here")
    one = (straight_one / checkpoint.NAME).stat().st_size
    folder, outside = tmp_path / "disk", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    train = " ".join(["exec 2>&1;", "(", sys.executable, *train_flags(pictures, folder), ")"])
    script = _SMALL_DISK.format(folder=folder, outside=outside, train=train, size=int(2.5 * one))
    process = subprocess.run(
        [unshare, "-rm", "sh", "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())},
        capture_output=True,
        text=True,
        timeout=200,
    )
    if process.returncode == 33:
        pytest.skip("mounting is not permitted here")
    full, free = process.stdout.split("code 2\n")
    assert "cannot write" in full and "No space left on device" in full
    assert "what was there before is unchanged" in full
    assert f"resumed:   {folder} after " in free and free.endswith("code 0\n")
    assert_same_run(outside, straight_one)
