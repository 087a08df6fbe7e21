"""What all processes of a run are fed with, step by step, until the end or until one of them has to stop."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

from dino.loader import BrokenPictures, EpochOrder, steady_batches
from dino.runtime import distributed
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted, UserError

_LONG_WAIT_SECONDS = 30.0
_LONG_WAIT_SHARE = 0.3


class _News(NamedTuple):
    """What one process has to tell the others before a step: pictures that it could not read, a signal that came."""

    broken: list[tuple[str, str]]
    signal_name: str


class Readable(Protocol):
    """What a feed asks of a batch."""

    @property
    def broken(self) -> list[tuple[str, str]]:
        """Name and reason of each picture that could not be read."""
        ...

    @property
    def whole(self) -> bool:
        """Whether there is something to compute with."""
        ...


AnyBatch = TypeVar("AnyBatch", bound=Readable)


def _one_part(parts: tuple[AnyBatch, ...]) -> AnyBatch:
    raise AssertionError(f"a step of {len(parts)} parts, and nothing to put them together")


class Feed(Generic[AnyBatch]):
    """Batches, and word of what concerns all processes.

    Args:
        open_loader: the loader of an order; see `loader.create_loader`.
        join: puts the parts of a step together, where it has several; see `loader.joined`.
        max_broken: see `loader.BrokenPictures`.
        num_workers: of the loaders, for a hint.
        say: prints a line of the whole run.

    Attributes:
        waited: seconds that this process has waited for pictures.
    """

    def __init__(
        self,
        open_loader: Callable[[EpochOrder], Iterable[AnyBatch]],
        interruption: Interruption,
        *,
        join: Callable[[tuple[AnyBatch, ...]], AnyBatch] = _one_part,
        max_broken: int,
        num_workers: int,
        say: Callable[[str], None],
    ) -> None:
        self.open_loader = open_loader
        self.interruption = interruption
        self.join = join
        self.num_workers = num_workers
        self.say = say
        self.broken = BrokenPictures(max_broken)
        self.waited = 0.0
        self._said_so = False

    def batches(self, order: EpochOrder) -> Iterator[AnyBatch]:
        """One for each step.

        Raises:
            UserError: too many pictures cannot be read. In all processes before the same step, as is
            Interrupted: a signal came; its name.
            RankFailed: see `loader.steady_batches`.
        """
        batches = steady_batches(self.open_loader, order, join=self.join, say=_say_as_this_process)
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - began
            if batch is None:
                return
            self._hear_all(batch)
            yield batch

    def long_waits(self, seconds: float) -> list[str]:
        """A line, once, when much of so many seconds went into waiting for pictures."""
        if self._said_so or self.waited <= max(_LONG_WAIT_SECONDS, _LONG_WAIT_SHARE * seconds):
            return []
        self._said_so = True
        return [
            f"waiting for pictures takes {self.waited / seconds:.0%} of the time, with {self.num_workers} loading "
            "processes: give more cores and --num_workers, smaller pictures, or a faster disk"
        ]

    def _hear_all(self, batch: AnyBatch) -> None:
        own = _News(batch.broken, self.interruption.signal_name)
        news = distributed.gather([own] if any(own) else [])
        broken = [entry for each in news for entry in each.broken]
        for line in self.broken.add(broken):
            self.say(line)
        if broken:
            self.broken.check()
            if distributed.gather([] if batch.whole else [distributed.rank()]):
                raise UserError("no readable picture is left for a step: see the list above")
        signals = sorted({each.signal_name for each in news} - {""})
        if signals:
            raise Interrupted(signals[0])


def _say_as_this_process(line: str) -> None:
    """What concerns one process is said by it, whichever it is."""
    print(line if distributed.world_size() == 1 else f"{distributed.this_process()}: {line}", flush=True)
