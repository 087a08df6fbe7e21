"""Loading processes that may die, of which the work they fed knows nothing but the time it takes."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import TypeVar

from dino.runtime.options import RankFailed

Item = TypeVar("Item")

# In a row, without a batch between them.
_DEATHS_ALLOWED = 3
# Seconds after which a process whose connection has failed is known to have ended.
_UNTIL_KNOWN = 2.0


def steady(open_loader: Callable[[int], Iterable[Item]], *, say: Callable[[str], None]) -> Iterator[Item]:
    """The batches of a DataLoader; when a worker dies, those that are left come from a new one.

    Args:
        open_loader: given how many batches have been taken, the loader of the rest.
        say: told of every death.

    Raises:
        RankFailed: workers die again and again.
    """
    done = deaths = 0
    while deaths <= _DEATHS_ALLOWED:
        before = set(multiprocessing.active_children())
        batches = iter(open_loader(done))
        workers = [child for child in multiprocessing.active_children() if child not in before]
        with _deaths_found_by_the_loader():
            try:
                for batch in batches:
                    yield batch
                    done, deaths = done + 1, 0
                return
            except (RuntimeError, OSError, EOFError):
                dead = _one_that_died(workers)
                if dead is None:
                    raise
        deaths += 1
        say(f"a loading process {_end_of(dead)}; its work is begun again, and no picture is left out")
        for worker in workers:
            worker.kill()
    raise RankFailed(
        f"loading processes died {deaths} times in a row: lower --num_workers (0 loads in the process itself), "
        "or look at what the pictures need"
    )


@contextmanager
def _deaths_found_by_the_loader() -> Iterator[None]:
    """torch raises an error where the main process happens to be when a worker dies, a step half done.

    Without that the loader finds out when it waits for a batch.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _one_that_died(workers: list[BaseProcess]) -> BaseProcess | None:
    """Its connection can fail a moment before it is known to have ended."""
    end = time.monotonic() + _UNTIL_KNOWN
    while workers:
        for worker in workers:
            if not worker.is_alive():
                return worker
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    return None


def _end_of(worker: BaseProcess) -> str:
    if worker.exitcode == -signal.SIGKILL:
        return "was killed (by the system, when no memory is left)"
    return f"ended with code {worker.exitcode}"
