"""Pre-train on a SLURM cluster: the command of `dino.train` with what to ask of the cluster.

python -m dino.slurm --nodes 2 --ngpus 8 --data_path pictures --output_dir runs/mine
python -m dino.slurm --nodes 1 --ngpus 0 --tasks_per_node 2 --cluster local --data_path pictures --output_dir runs/mine

Before its time limit, and when it is preempted, the job saves, is queued again and continues by itself.
Needs submitit: pip install 'dino-xcit[slurm]'. `--help` imports neither it nor torch.
"""

import io
import os
import re
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino.runtime.options import RunStopped, UserError, command
from dino.slurm_options import (
    SlurmTraining,
    check_slurm_options,
    defaults,
    job_folder,
    sbatch_parameters,
    tasks_per_node,
    training_options,
)
from dino.train_options import TrainOptions

if TYPE_CHECKING:
    import submitit


def run(options: SlurmTraining) -> None:
    """Submit the training, or run it here, or print what would be submitted.

    Raises:
        UserError: the options cannot work, or the cluster refuses them; nothing is queued.
        RunStopped: what was run here failed.
    """
    check_slurm_options(options)
    training = training_options(options)
    _check_training(training)
    _require_submitit()
    if options.dry_run:
        print(sbatch_script(options))
    elif options.cluster in ("auto", "slurm"):
        _submit(options, training)
    else:
        _run_here(options, training)


def _check_training(training: TrainOptions) -> None:
    from dino.plan import check_options

    check_options(training)


def _require_submitit() -> None:
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise UserError("submitit is not installed: pip install 'dino-xcit[slurm]'") from None


def sbatch_script(options: SlurmTraining) -> str:
    """What `sbatch` would get; asks for no cluster and makes no file."""
    from submitit import SlurmExecutor

    class Writer(SlurmExecutor):
        """Works where there is no SLURM."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    writer = Writer(job_folder(options))
    writer.update_parameters(**sbatch_parameters(options))
    return writer._make_submission_file_text(writer._submitit_command_str, uid="")


def _submit(options: SlurmTraining, training: TrainOptions) -> None:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"there is no {' and no '.join(missing)} here: submit from a machine of the cluster, see what would be "
            "submitted with --dry_run, or run on this machine alone with --cluster local --nodes 1"
        )
    folder = _prepared_folder(options)
    executor = SlurmExecutor(folder, max_num_timeout=options.max_requeues)
    executor.update_parameters(**sbatch_parameters(options))
    try:
        with redirect_stderr(io.StringIO()):  # where submitit says it too
            job = _submitted(executor, training)
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"sbatch refused the job: {reason}") from None
    _report(job, options)
    print(f"state:     squeue --jobs={job.job_id}", f"cancel:    scancel {job.job_id}", sep="\n")


def _run_here(options: SlurmTraining, training: TrainOptions) -> None:
    from submitit import DebugExecutor, LocalExecutor

    folder = _prepared_folder(options)
    if options.cluster == "debug":
        _submitted(DebugExecutor(folder), training).results()
        return
    executor = LocalExecutor(folder, max_num_timeout=options.max_requeues)
    executor.update_parameters(
        nodes=1,
        tasks_per_node=tasks_per_node(options),
        gpus_per_node=options.ngpus,
        timeout_min=options.timeout,
        signal_delay_s=options.signal_delay,
        setup=list(options.setup),
    )
    job = _submitted(executor, training)
    _report(job, options)
    print(f"cancel:    kill -INT {job.job_id}, or Ctrl-C", flush=True)
    job.wait()
    failed = _failed_task(job)
    if failed is not None:
        logs = failed.paths
        said = logs.stderr.read_text(errors="replace").split("\n") if logs.stderr.exists() else []
        last = next((line for line in reversed(said) if line.strip()), "it ended without a word")
        raise RunStopped(f"the job failed: {last}; see {logs.stderr} and {logs.stdout}")
    print("done")


def _prepared_folder(options: SlurmTraining) -> Path:
    from submitit.core.utils import JobPaths

    from dino.runtime.files import make_writable

    folder = job_folder(options)
    make_writable(JobPaths.get_first_id_independent_folder(folder), "--job_dir")
    return folder


def _submitted(executor: "submitit.Executor", training: TrainOptions) -> "submitit.Job[Any]":
    from submitit.helpers import clean_env

    from dino.slurm_job import PretrainingJob

    # Defaults for sbatch that the user, or the cluster, has set.
    kept = {name: value for name, value in os.environ.items() if re.match("SLURM_CONF$|SBATCH_", name)}
    with clean_env():  # or a job that is submitted from within another takes itself for that one
        os.environ.update(kept)
        return executor.submit(PretrainingJob(training))


def _report(job: "submitit.Job[Any]", options: SlurmTraining) -> None:
    machines = "1 machine" if options.nodes == 1 else f"{options.nodes} machines"
    tasks = tasks_per_node(options)
    print(f"submitted: job {job.job_id} on {machines} x {tasks} process{'es' if tasks > 1 else ''}")
    print(f"logs:      {job.paths.stdout.parent}")
    print(f"watch:     tail -F {job.paths.stdout}", flush=True)


def _failed_task(job: "submitit.Job[Any]") -> "submitit.Job[Any] | None":
    """The first process that did not end well, of a job that is over."""
    for number in range(job.num_tasks):
        task = job.task(number)
        # What exits by itself leaves no result, for which submitit would wait a while.
        if not task.paths.result_pickle.exists() or task.exception() is not None:
            return task
    return None


def main() -> None:
    command(
        SlurmTraining,
        run,
        prog="python -m dino.slurm",
        description="Pre-train a backbone with DINO on a SLURM cluster. Options of the cluster come first, then those "
        "of dino.train; they may be given in any order.",
        defaults=defaults,
    )


if __name__ == "__main__":
    main()
