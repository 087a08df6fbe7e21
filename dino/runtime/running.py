"""What every training run is surrounded by: its processes, its folder, and signals that ask it to end."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from dino.runtime import distributed
from dino.runtime.claim import claimed
from dino.runtime.files import make_writable
from dino.runtime.interruption import Interruption


@contextmanager
def running(
    folder: Path,
    device: torch.device,
    *,
    check: Callable[[], None],
    dist_url: str,
    wait_minutes: float,
    deterministic: bool = False,
) -> Iterator[Interruption]:
    """A run of all processes that torchrun started, or of this one alone, in a folder that is its own.

    Args:
        folder: of `--output_dir`; made where it is missing.
        check: refuses options that cannot work, before anything is written.
        dist_url: where processes meet.
        wait_minutes: how long a restarted run waits for the one before, which may not know yet that it is over.
        deterministic: only algorithms that give the same bits every time.

    Yields:
        What notes the signals.

    Raises:
        UserError, RunStopped: as raised inside; one process says it, all exit with its code.
    """
    with (
        Interruption() as interruption,
        distributed.deterministic(deterministic),
        distributed.processes(device, dist_url=dist_url),
        warnings.catch_warnings(),
        ExitStack() as stack,
    ):
        # Of DistributedDataParallel, for depthwise convolutions, whose two layouts are the same memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with distributed.together():
            check()
            make_writable(folder, "--output_dir")
            if distributed.is_main():
                # After a restart the process before may be alive, on another machine, until it gives up the others.
                patience = 60 * wait_minutes if distributed.restart_note() else 0
                stack.enter_context(claimed(folder, "--output_dir", patience=patience))
        yield interruption
