"""What all processes of a run are fed with, step by step, until the end or until one of them has to stop."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from PIL import Image
from torch.utils.data import DataLoader

from dino.loader import Batch, BrokenPictures, EpochOrder, create_loader, steady_batches
from dino.multicrop import Views
from dino.runtime import distributed
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted, UserError
from dino.runtime.pictures import Pictures

_LONG_WAIT_SECONDS = 30.0
_LONG_WAIT_SHARE = 0.3


class _News(NamedTuple):
    """What one process has to tell the others before a step: pictures that it could not read, a signal that came."""

    broken: list[tuple[str, str]]
    signal_name: str


class Feed:
    """Batches of views, and word of what concerns all processes.

    Args:
        enough: see `loader.ViewsOfPictures`.
        max_broken: see `loader.BrokenPictures`.
        say: prints a line of the whole run.

    Attributes:
        waited: seconds that this process has waited for pictures.
    """

    def __init__(
        self,
        pictures: Pictures,
        transform: Callable[[Image.Image], Views],
        interruption: Interruption,
        *,
        enough: int,
        max_broken: int,
        num_workers: int,
        pin_memory: bool,
        say: Callable[[str], None],
    ) -> None:
        self.pictures = pictures
        self.transform = transform
        self.interruption = interruption
        self.enough = enough
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.say = say
        self.broken = BrokenPictures(max_broken)
        self.waited = 0.0
        self._said_so = False

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """One for each step.

        Raises:
            UserError: too many pictures cannot be read. In all processes before the same step, as is
            Interrupted: a signal came; its name.
            RankFailed: see `loader.steady_batches`.
        """
        batches = steady_batches(self._open_loader, order, say=_say_as_this_process)
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

    def _open_loader(self, order: EpochOrder) -> DataLoader[Batch]:
        return create_loader(
            self.pictures,
            self.transform,
            order,
            enough=self.enough,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )

    def _hear_all(self, batch: Batch) -> None:
        own = _News(batch.broken, self.interruption.signal_name)
        news = distributed.gather([own] if any(own) else [])
        broken = [entry for each in news for entry in each.broken]
        for line in self.broken.add(broken):
            self.say(line)
        if broken:
            self.broken.check()
            if distributed.gather([] if batch.views else [distributed.rank()]):
                raise UserError("no readable picture is left for a step: see the list above")
        signals = sorted({each.signal_name for each in news} - {""})
        if signals:
            raise Interrupted(signals[0])


def _say_as_this_process(line: str) -> None:
    """What concerns one process is said by it, whichever it is."""
    print(line if distributed.world_size() == 1 else f"{distributed.this_process()}: {line}", flush=True)
