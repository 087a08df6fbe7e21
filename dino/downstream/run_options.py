"""The options that all downstream tasks share. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from dino.runtime.options import UserError, option


@dataclass(frozen=True)
class RunOptions:
    """Where a run is kept, what it computes on, and how its pictures come."""

    output_dir: str = option(".", "Folder for checkpoints, log and results; a run found there is continued.")
    seed: int = option(0, "Seed of weights, order and distortions.")
    num_workers: int = option(10, "Loading processes per process, at most the usable cores; 0 = none.")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps.")
    precision: str = option(
        "auto",
        "Of the forward pass; auto = bf16 where the device has it.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    dist_url: str = option("env://", "How processes find each other; torchrun's environment by default.")
    local_rank: int = option(0, "Set by old launchers; torchrun's LOCAL_RANK wins.")
    grad_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, slower."
    )
    save_every_minutes: float = option(10.0, "Save within an epoch this often; 0 = at its end only.")
    max_broken: int = option(100, "Stop after more unreadable pictures than this; -1 = never.")
    wait_minutes: float = option(
        10.0, "A process that waits for the others longer than this gives up; the start may take 3 hours."
    )


def check_run_options(options: RunOptions) -> None:
    """Refuse what cannot work before anything is opened or written.

    Raises:
        UserError: says which option, and what is allowed.
    """
    require(options, "seed", 0 <= options.seed < 2**63, "must lie in [0, 2^63)")
    require_at_least(options, 0, "num_workers", "save_every_minutes")
    require(options, "wait_minutes", options.wait_minutes > 0, "must be above 0")


def require(options: Any, name: str, holds: bool, rule: str) -> None:
    """Raises a UserError on the option of that name where the rule does not hold."""
    if not holds:
        value = getattr(options, name)
        written = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise UserError(f"--{name} {rule}, got {written}")


def require_at_least(options: Any, least: float, *names: str) -> None:
    """The same for numbers that have a lowest value."""
    for name in names:
        require(options, name, getattr(options, name) >= least, f"must be {least:g} or more")
