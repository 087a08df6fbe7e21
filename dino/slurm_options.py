"""The options of a pre-training on a SLURM cluster, and what they ask of sbatch. Imports no torch and no submitit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dino.runtime.files import expanded
from dino.runtime.options import UserError, option
from dino.train_options import TrainOptions, preset_defaults

CLUSTERS = ("auto", "slurm", "local", "debug")
# A folder's name may hold it: SLURM and submitit put the job's number in its place.
JOB_NUMBER = "%j"

_V100_32GB = "volta32gb"


@dataclass(frozen=True)
class SlurmOptions:
    """The options of DINO's and XCiT's run_with_submitit.py under their names, then those that they lack."""

    nodes: int = option(2, "Machines.")
    ngpus: int = option(8, "GPUs per machine, a process for each; 0 = train on CPUs.")
    timeout: int = option(
        2800, "Minutes until SLURM ends the job; shortly before, it saves and queues again."
    )
    partition: str = option("", "Partition; empty = the cluster's default.")
    use_volta32: bool = option(False, f"Only V100 GPUs with 32 GB: the constraint {_V100_32GB}.")
    comment: str = option("", "Comment for the scheduler; empty = none.")
    job_dir: str = option(
        "",
        "Folder for the job's logs and submitit's files, seen by all machines; among them are pickles, which can "
        "run code, so keep it your own. Empty = slurm/ in --output_dir.",
    )

    cluster: str = option(
        "auto",
        "slurm; local = run here and now, on one machine; debug = in this very process; auto = slurm.",
        choices=CLUSTERS,
    )
    dry_run: bool = option(False, "Print the script that sbatch would get, and submit and write nothing.")
    tasks_per_node: int = option(0, "Processes per machine; 0 = one per GPU, or one without GPUs.")
    cpus_per_task: int = option(10, "CPU cores per process, as its --num_workers; 0 = the cluster's default.")
    mem_gb: int = option(0, "Memory per machine in GB; 0 = the cluster's default.")
    account: str = option("", "Account that is charged; empty = your default.")
    qos: str = option("", "Quality of service; empty = your default.")
    constraint: str = option("", "Features that machines must have; empty = none.")
    exclude: str = option("", "Machines not to use; empty = none.")
    job_name: str = option("dino", "Name in the queue.")
    max_requeues: int = option(
        30, "Time limits after which the job is queued again, to continue; preemptions do not count."
    )
    signal_delay: int = option(120, "Seconds before the time limit at which the run is told to save.")
    setup: tuple[str, ...] = option(
        (), "Lines of shell before the run, such as 'module load cuda' 'export NCCL_SOCKET_IFNAME=ib0'."
    )
    sbatch: tuple[str, ...] = option(
        (), "Further options of sbatch, such as reservation=mine mail-type=END exclusive."
    )


@dataclass(frozen=True)
class SlurmTraining(TrainOptions, SlurmOptions):
    """All that may be given: the options of the cluster, then those of the training."""


def defaults(arguments: Sequence[str]) -> SlurmTraining:
    """Those of `dino.train` under the preset that the arguments name; --output_dir must be given."""
    training = preset_defaults(arguments)
    values = {field.name: getattr(training, field.name) for field in fields(TrainOptions)}
    return SlurmTraining(**{**values, "output_dir": ""})


def training_options(options: SlurmTraining) -> TrainOptions:
    """Those of the run alone, its folder with its whole path."""
    values = {field.name: getattr(options, field.name) for field in fields(TrainOptions)}
    return TrainOptions(**{**values, "output_dir": str(_whole(options.output_dir, "--output_dir"))})


def job_folder(options: SlurmTraining) -> Path:
    """Where the logs and submitit's files go."""
    if options.job_dir:
        return _whole(options.job_dir, "--job_dir")
    return _whole(options.output_dir, "--output_dir") / "slurm"


def _whole(folder: str, name: str) -> Path:
    return expanded(folder, name).absolute()


def tasks_per_node(options: SlurmOptions) -> int:
    return options.tasks_per_node or max(options.ngpus, 1)


def check_slurm_options(options: SlurmTraining) -> None:
    """Refuse what cannot work before it waits in a queue.

    Raises:
        UserError: says which option, and what is allowed.
    """
    for name in ("nodes", "timeout"):
        _require(options, name, getattr(options, name) >= 1, "must be 1 or more")
    for name in ("ngpus", "tasks_per_node", "cpus_per_task", "mem_gb", "max_requeues", "signal_delay"):
        _require(options, name, getattr(options, name) >= 0, "must be 0 or more")
    in_time = options.signal_delay < 60 * options.timeout
    _require(options, "signal_delay", in_time, f"must be less than --timeout ({options.timeout} minutes)")
    _check_processes(options)
    _check_folders(options)
    _sbatch_options(options.sbatch)


def _require(options: SlurmOptions, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"--{name} {rule}, got {getattr(options, name)}")


def _check_processes(options: SlurmTraining) -> None:
    one_each = options.ngpus == 0 or tasks_per_node(options) == options.ngpus
    _require(options, "tasks_per_node", one_each, f"must be that of the GPUs ({options.ngpus}), or 0")
    if options.ngpus and options.device.partition(":")[0] not in ("auto", "cuda"):
        raise UserError(f"--device {options.device} needs no GPU: give --ngpus 0, and --tasks_per_node")
    if not options.ngpus and options.device.startswith("cuda"):
        raise UserError(f"--device {options.device} with --ngpus 0: give --ngpus, or another --device")
    if options.cluster in ("local", "debug"):
        _require(options, "nodes", options.nodes == 1, f"must be 1 with --cluster {options.cluster}")
    if options.cluster == "debug" and tasks_per_node(options) > 1:
        raise UserError("--cluster debug is one process: give --ngpus 1 or 0, and no --tasks_per_node")


def _check_folders(options: SlurmTraining) -> None:
    if not options.output_dir:
        raise UserError(
            "--output_dir must be given: a folder that all machines see, in which the run is saved and continued"
        )
    for folder in (options.output_dir, options.job_dir):
        if "%" in folder.replace(JOB_NUMBER, ""):
            raise UserError(
                f"{folder}: a % in a folder's name means something to SLURM; only {JOB_NUMBER}, the job's number, "
                "can be used"
            )


def sbatch_parameters(options: SlurmOptions) -> dict[str, Any]:
    """The keywords of submitit's SlurmExecutor; what is not asked for is left to the cluster."""
    tasks = tasks_per_node(options)
    constraint = "&".join(filter(None, [_V100_32GB if options.use_volta32 else "", options.constraint]))
    # A process that dies ends the others, who would wait for it. And since 22.05 srun does not take the number of
    # cores from the job.
    srun = ["--kill-on-bad-exit=1"]
    if options.cpus_per_task:
        srun.append(f"--cpus-per-task={options.cpus_per_task}")
    asked = {
        "gpus_per_node": options.ngpus,
        "cpus_per_task": options.cpus_per_task,
        "mem": f"{options.mem_gb}GB" if options.mem_gb else "",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": constraint,
        "exclude": options.exclude,
        "comment": options.comment,
        "setup": list(options.setup),
    }
    return {
        "job_name": options.job_name,
        "time": options.timeout,
        "nodes": options.nodes,
        "ntasks_per_node": tasks,
        "signal_delay_s": options.signal_delay,
        "wckey": None,  # submitit's own, which a cluster that checks them refuses
        "srun_args": srun,
        # When SLURM itself preempts the job, or a machine fails.
        "additional_parameters": {"requeue": True, **_sbatch_options(options.sbatch)},
        **{name: value for name, value in asked.items() if value},
    }


def _sbatch_options(written: Sequence[str]) -> dict[str, str | bool]:
    """`mail-type=END` and `exclusive` as {"mail-type": "END", "exclusive": True}."""
    named: dict[str, str | bool] = {}
    for word in written:
        name, equals, value = word.removeprefix("--").partition("=")
        if not re.fullmatch("[a-z][a-z0-9-]*", name) or (equals and not value):
            raise UserError(f"--sbatch {word}: write name=value, or a name alone, as sbatch's long options")
        named[name] = value if equals else True
    return named
