"""What a process of a downstream run computes with, and the folder that the run has to itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from dino.downstream.run_options import RunOptions
from dino.evaluation.results import check_results
from dino.runtime import distributed
from dino.runtime.interruption import Interruption
from dino.runtime.running import running


class Machine(NamedTuple):
    """Device, precision of the forward pass (`fp32`, `bf16` or `fp16`), and loading processes."""

    device: torch.device
    precision: str
    num_workers: int

    @classmethod
    def of(cls, options: RunOptions) -> "Machine":
        """What the options ask for, here.

        Raises:
            UserError: this machine does not have it.
        """
        device = distributed.pick_device(options.device, options.local_rank)
        precision = distributed.pick_precision(options.precision, device)
        return cls(device, precision, distributed.share_cores(device, options.num_workers))


@contextmanager
def own_run(options: RunOptions, machine: Machine, check: Callable[[], None]) -> Iterator[Interruption]:
    """A run of all processes in `--output_dir`, whose options and results are checked first: see `running`.

    Args:
        check: refuses options that cannot work.
    """
    folder = Path(options.output_dir)

    def check_all() -> None:
        check()
        check_results(folder)

    with running(
        folder, machine.device, check=check_all, dist_url=options.dist_url, wait_minutes=options.wait_minutes
    ) as interruption:
        yield interruption
