"""What each process of a SLURM job does: join the others, pre-train, and have the job queued again when it must end."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import NoReturn

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from dino.runtime.options import Interrupted, RunStopped, UserError
from dino.slurm_options import JOB_NUMBER
from dino.train_options import TrainOptions

PROG = "python -m dino.slurm"


@dataclass(frozen=True)
class PretrainingJob:
    """The pre-training as submitit calls it, once in every process.

    submitit hands this object to the job as a pickle in its folder, and whoever can write there can have code of
    theirs run: the folder must be the user's own. What a run continues from is its checkpoint, not a pickle.
    """

    options: TrainOptions

    def __call__(self) -> None:
        number = _join_processes()
        options = replace(self.options, output_dir=self.options.output_dir.replace(JOB_NUMBER, number))
        from dino.pretraining import pretrain

        try:
            pretrain(options)
        except Interrupted as reason:
            _say(reason)
            _queue_again()
        except (UserError, RunStopped) as reason:
            _say(reason)
            raise SystemExit(reason.exit_code) from None
        except SystemExit as stop:  # of a process whose reason the main one says
            if stop.code != Interrupted.exit_code:
                raise
            # Not as an error, for which SLURM would end the main process, which may not have asked for the requeue.
            raise SystemExit(0) from None

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues in place of this: the same, which continues what is in its folder."""
        return DelayedSubmission(self)


def _join_processes() -> str:
    """Tell torch.distributed who the others are; returns the job's number."""
    job = JobEnvironment()
    environment = TorchDistributedEnvironment()
    if job.num_nodes == 1:
        environment.master_addr = "localhost"  # the machine's name need not lead anywhere
    if _has_own_cores(environment.local_world_size):
        environment.local_world_size = 1
    # Each process sees all GPUs of its machine and takes that of its local rank.
    environment.export(set_cuda_visible_devices=False, overwrite=True)
    return job.job_id


def _has_own_cores(processes: int) -> bool:
    """Whether SLURM has bound this process to cores, so that it shares them with no other."""
    from dino.runtime.distributed import usable_cores

    return usable_cores() < processes * int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))


def _say(reason: Exception) -> None:
    print(f"{PROG}: {reason}", file=sys.stderr, flush=True)


def _queue_again() -> NoReturn:
    """Let submitit's handler of signals do it, which the run kept from answering until all was saved."""
    job = JobEnvironment()
    number = signal.Signals[f"SIG{job.USR_SIG}"]
    handler = signal.getsignal(number)
    if callable(handler) and not _slurm_ends_it(job):
        signal.signal(number, signal.SIG_IGN)  # a second one would disturb the handler's writing
        handler(number, None)
    raise SystemExit(Interrupted.exit_code)


def _slurm_ends_it(job: JobEnvironment) -> bool:
    """Whether SLURM is already ending the job: cancelled, which a requeue would undo, or queued again by SLURM."""
    if job.cluster != "slurm":
        return False
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job.job_id}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0 and asked.stdout.split() != ["RUNNING"]
