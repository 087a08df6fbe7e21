"""Signals that ask a run to end: preemption, a time limit, a shutdown."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# Of process managers and torchrun; of SLURM before a time limit (--signal=USR1); of submitit.
_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2")


class Interruption:
    """While entered, such a signal is only noted, so that the run can save.

    However often it comes: a scheduler and torchrun may each send one, for the same reason.

    Attributes:
        signal_name: of the signal that came, "" before.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in _signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


def outlive_interruption(worker: int = 0) -> None:
    """For loading processes, which get the signals of their group too: the run goes on to its next save with them.

    SIGTERM, with which a loader ends its workers, is let through the second time.
    """
    for number in _signals():
        is_term = number == signal.SIGTERM
        signal.signal(number, _allow_next if is_term else signal.SIG_IGN)


def _allow_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _signals() -> list[signal.Signals]:
    return [signal.Signals[name] for name in _NAMES if hasattr(signal, name)]
