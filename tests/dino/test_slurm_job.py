"""What each process of a job does, alone and as submitit runs it, and what becomes of it when it is told to end."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import submitit

from dino import pretraining
from dino.runtime import checkpoint, distributed
from dino.runtime.options import Interrupted, RunStopped, UserError
from dino.slurm_job import PretrainingJob
from dino.train_options import TrainOptions
from tests.dino.small_runs import TINY, assert_same_run, rows, tiny, write_pictures
from tests.fake_programs import put

ASKED = "python -m dino.slurm: "


@pytest.fixture
def job(tmp_path, monkeypatch):
    """As process 3 of 4, the second of the second machine, in job 77, as SLURM would have it."""
    variables = {"JOB_ID": 77, "NTASKS": 4, "JOB_NUM_NODES": 2, "NODEID": 1, "PROCID": 3, "LOCALID": 1}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu-[07-08]")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    # What the job sets, for it to be as before after the test; and what a user's shell may have set.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "9")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setattr(distributed, "usable_cores", lambda: 20)
    return PretrainingJob(TrainOptions(output_dir=str(tmp_path / "%j")))


def pretrain_that(monkeypatch, act):
    monkeypatch.setattr(pretraining, "pretrain", act)


def test_a_process_learns_from_slurm_who_it_is(job, monkeypatch, tmp_path):
    seen = {}

    def look(options):
        seen.update(os.environ, output_dir=options.output_dir)

    pretrain_that(monkeypatch, look)
    job()
    names = ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "output_dir")
    assert [seen[name] for name in names] == ["gpu-07", "3", "4", "1", "2", f"{tmp_path}/77"]
    assert 20000 <= int(seen["MASTER_PORT"]) <= 60000
    assert "CUDA_VISIBLE_DEVICES" not in seen or seen["CUDA_VISIBLE_DEVICES"] != "1"


@pytest.mark.parametrize(("per_task", "sharing"), [("10", "2"), ("20", "1"), (None, "2")])
def test_cores_are_not_shared_out_twice(job, monkeypatch, per_task, sharing):
    if per_task:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", per_task)
    pretrain_that(monkeypatch, lambda options: None)
    job()
    assert os.environ["LOCAL_WORLD_SIZE"] == sharing


def test_one_machine_needs_no_name(job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    pretrain_that(monkeypatch, lambda options: None)
    job()
    assert os.environ["MASTER_ADDR"] == "localhost"


@pytest.mark.parametrize(("error", "code"), [(UserError("no such folder"), 2), (RunStopped("not finite"), 1)])
def test_what_ends_a_run_is_a_sentence_in_the_log_and_asks_for_no_requeue(
    job, monkeypatch, capsys, error, code
):
    def fail(options):
        raise error

    pretrain_that(monkeypatch, fail)
    with handled() as requeues, pytest.raises(SystemExit) as stop:
        job()
    assert (stop.value.code, capsys.readouterr().err) == (code, f"{ASKED}{error}\n")
    assert requeues == []


class handled:  # noqa: N801
    """A handler in the place of submitit's; what it got."""

    def __init__(self, number=signal.SIGUSR2):
        self.number = number

    def __enter__(self):
        got = []

        def requeue(number, frame):
            got.append((number, signal.getsignal(number)))
            raise SystemExit(-1)

        self.before = signal.signal(self.number, requeue)
        return got

    def __exit__(self, *_):
        signal.signal(self.number, self.before)


def interrupted(options):
    raise Interrupted("stopped by SIGTERM")


@pytest.mark.parametrize(
    ("squeue", "requeued"),
    [
        ("echo RUNNING", True),  # a time limit, or a grace time
        ("echo COMPLETING", False),  # scancel, or SLURM queues it again
        ("echo CANCELLED", False),
        ("", False),  # the job is gone
        ("exit 1", True),  # nobody knows, and the run is worth it
    ],
)
def test_an_interrupted_job_asks_for_the_queue_unless_slurm_ends_it(
    job, monkeypatch, tmp_path, capsys, squeue, requeued
):
    put(tmp_path, "squeue", f'echo "$@" > {tmp_path}/asked\n{squeue}')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    pretrain_that(monkeypatch, interrupted)
    with handled() as requeues, pytest.raises(SystemExit) as stop:
        job()
    # While submitit writes, a second signal is not heard.
    assert requeues == ([(signal.SIGUSR2, signal.SIG_IGN)] if requeued else [])
    assert stop.value.code == (-1 if requeued else 75)
    assert "--jobs=77" in (tmp_path / "asked").read_text().split()
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_where_nobody_requeues_the_exit_code_asks_for_it(job, monkeypatch):
    pretrain_that(monkeypatch, interrupted)
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    with pytest.raises(SystemExit) as stop:
        job()
    assert stop.value.code == 75


@pytest.mark.parametrize(("code", "left"), [(75, 0), (2, 2), (1, 1)])
def test_the_other_processes_do_not_end_the_main_one_while_it_asks(job, monkeypatch, code, left):
    def leave(options):
        raise SystemExit(code)

    pretrain_that(monkeypatch, leave)
    with handled() as requeues, pytest.raises(SystemExit) as stop:
        job()
    assert (stop.value.code, requeues) == (left, [])


def test_what_is_queued_again_is_the_same_job(job):
    again = job.checkpoint()
    assert again.function == job
    assert (again.args, again.kwargs) == ((), {})
    assert pickle.loads(pickle.dumps(job)) == job


# Whole runs, in processes of their own.

TRAINING = {**TINY, "warmup_epochs": 0, "knn_freq": 0, "saveckp_freq": 0, "save_every_minutes": 1e-9}
CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
LOCAL = ("-m", "dino.slurm", "--cluster=local", "--nodes=1", "--ngpus=0", "--tasks_per_node=2")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), count=24)


def start(*arguments, environment=None, **options):
    """A Python process that computes in one thread."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
    )


def finish(process, code=0):
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, out + err
    return out, err


def wait_for_steps(folder, process):
    """Until the second step is saved."""
    while not (folder / checkpoint.PREVIOUS_NAME).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def children(number):
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


@pytest.fixture(scope="module")
def by_torchrun(many, tmp_path_factory):
    """The same training by two processes of torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dino.train")
    finish(start(*torchrun, **TRAINING, epochs=2, data_path=many, output_dir=folder))
    return folder


@pytest.mark.slow
def test_two_processes_of_submitit_train_as_two_of_torchrun(many, by_torchrun, tmp_path):
    folder = tmp_path / "run"
    out, err = finish(start(*LOCAL, **TRAINING, epochs=2, data_path=many, output_dir=folder))
    assert "on 1 machine x 2 processes" in out and "done" in out
    assert err == ""
    (log,) = (folder / "slurm").glob("*_0_log.out")
    assert "of 8 pictures (2 processes x 4)" in log.read_text()
    assert [row["epoch"] for row in rows(folder)] == [0, 1]
    assert_same_run(folder, by_torchrun)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
def test_a_preempted_job_saves_starts_again_and_ends_as_if_nothing_had_been(many, by_torchrun, tmp_path):
    """submitit's local controller starts a job again that asks for it, as SLURM does."""
    folder = tmp_path / "run"
    process = start(*LOCAL, **TRAINING, epochs=2, data_path=many, output_dir=folder)
    wait_for_steps(folder, process)
    (controller,) = children(process.pid)
    os.kill(children(controller)[1], signal.SIGUSR2)
    finish(process)
    (log,) = (folder / "slurm").glob("*_0_log.out")
    assert log.read_text().count("Starting with JobEnvironment") == 2
    assert "resumed:   " in log.read_text()
    assert "stopped by SIGUSR2" in log.with_suffix(".err").read_text()
    assert_same_run(folder, by_torchrun)


@pytest.mark.slow
def test_a_failure_of_a_local_job_is_told_with_its_reason_and_its_log(tmp_path):
    folder = tmp_path / "run"
    options = {**TRAINING, "epochs": 1, "data_path": "/nowhere", "output_dir": folder}
    _, err = finish(start(*LOCAL, **options), code=1)
    assert len(err.splitlines()) == 1
    assert "the job failed: " in err and "/nowhere is no file or folder" in err
    (log,) = (folder / "slurm").glob("*_0_log.err")
    assert str(log) in err
    assert "Traceback" not in log.read_text()


def submitted(jobs, output_dir, pictures):
    """A job's folder, as it is when the job starts."""
    options = tiny(pictures, output_dir, epochs=2, knn_freq=0, save_every_minutes=1e-9)
    submission = submitit.helpers.DelayedSubmission(PretrainingJob(options))
    submission.set_timeout(timeout_min=600, max_num_timeout=3)
    jobs.mkdir()
    submission.dump(jobs / "77_submitted.pkl")
    return jobs


def start_as_slurm(jobs, tools):
    """The one process of job 77."""
    variables = {"JOB_ID": 77, "NTASKS": 1, "JOB_NUM_NODES": 1, "NODEID": 0, "PROCID": 0, "LOCALID": 0}
    named = {f"SLURM_{name}": str(value) for name, value in variables.items()}
    named |= {"SUBMITIT_EXECUTOR": "slurm", "PATH": f"{tools}:{os.environ['PATH']}"}
    # On one core: two threads that wait for each other take far longer where other tests run beside.
    one_core = f"import os; hasattr(os, 'sched_setaffinity') and os.sched_setaffinity(0, {[CORE]})"
    run = "from submitit.core.submission import submitit_main; submitit_main()"
    return start("-c", f"{one_core}; {run}", jobs, environment=named)


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    finish(start_as_slurm(submitted(root / "jobs", root / "run", many), root))
    return root / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "state", "code"),
    [
        (signal.SIGUSR2, "RUNNING", 255),  # the time limit; with SIGTERM, preemption with a grace time
        (signal.SIGTERM, "COMPLETING", 75),  # preemption in which SLURM queues the job again, or scancel
    ],
)
def test_a_job_that_slurm_tells_to_end_asks_for_the_queue_and_continues(
    many, undisturbed, tmp_path, number, state, code
):
    tools = put(tmp_path / "bin", "squeue", f"echo {state}")
    put(tools, "scontrol", f'echo "$@" >> {tmp_path}/asked')
    jobs, folder = submitted(tmp_path / "jobs", tmp_path / "run", many), tmp_path / "run"
    process = start_as_slurm(jobs, tools)
    wait_for_steps(folder, process)
    process.send_signal(number)
    finish(process, code=code)
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 77\n" if state == "RUNNING" else "")
    assert checkpoint.load_latest(folder)[0]["epoch"] < 2

    out, _ = finish(start_as_slurm(jobs, tools))
    assert "resumed:   " in out
    assert_same_run(folder, undisturbed)
