"""Batches of views in an order that depends on the seed alone: the same for any number of processes or workers.

A step takes the next pictures of its epoch's permutation, split over the ranks; every picture's distortions are
seeded by (seed, epoch, picture). A run therefore resumes at any picture, with any batch, without replaying anything.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino.multicrop import Views
from dino.runtime.images import BrokenImageError
from dino.runtime.interruption import outlive_interruption
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures
from dino.runtime.workers import steady

AnyBatch = TypeVar("AnyBatch")

Key: TypeAlias = tuple[int, int]  # epoch, index of the picture


class Batch(NamedTuple):
    """What `multicrop.Views` holds, with a first dimension for the pictures.

    Attributes:
        views: (B, 3, H, W), one tensor for each view.
        broken: the pictures that could not be read, as (name, reason).
        distortions: (B, views, fields); None = nothing is to be done to the views.
    """

    views: list[Tensor]
    broken: list[tuple[str, str]]
    distortions: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether there is something to compute with."""
        return bool(self.views)


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class EpochOrder(Sampler[list[Key]]):
    """This rank's pictures, from a place in an epoch to the end of the run.

    Attributes:
        count: pictures in the set; those of an epoch's end that fill no step are left out of it.
        global_batch: pictures of one step, over all ranks, as many for each.
        epochs: of the whole run.
        seed: of the permutations.
        epoch, samples: epochs that are done, and pictures of the next.
        parts: lists that a rank's share of a step comes in, equally long.
        repeats: how often a picture comes in a row, for repeated augmentation (Hoffer et al. 2020). An epoch is as
            long as without: it leaves out pictures. The first number of a key then tells repetitions apart too.
    """

    count: int
    global_batch: int
    epochs: int
    seed: int
    epoch: int = 0
    samples: int = 0
    rank: int = 0
    world_size: int = 1
    parts: int = 1
    repeats: int = 1

    def __len__(self) -> int:
        """Lists that are left."""
        return (
            max(self._steps_left() + (self.epochs - self.epoch - 1) * self._steps_per_epoch(), 0) * self.parts
        )

    def __iter__(self) -> Iterator[list[Key]]:
        of_part = self.global_batch // self.world_size // self.parts
        for epoch in range(self.epoch, self.epochs):
            keys = self._keys(epoch)
            first = self.samples if epoch == self.epoch else 0
            for start in range(first, self.count - self.global_batch + 1, self.global_batch):
                mine = keys[start : start + self.global_batch][self.rank :: self.world_size].tolist()
                for place in range(0, len(mine), of_part):
                    yield [(turn, index) for turn, index in mine[place : place + of_part]]

    def _keys(self, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """(count, 2): the keys of an epoch in their order."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        places = np.arange(self.count)
        turns = epoch * self.repeats + places % self.repeats
        return np.stack([turns, order[places // self.repeats]], axis=1)

    def after(self, steps: int) -> "EpochOrder":
        """The rest when so many steps more are done."""
        here = self._steps_left()
        if steps < here:
            return replace(self, samples=self.samples + steps * self.global_batch)
        epochs, more = divmod(steps - here, self._steps_per_epoch())
        return replace(self, epoch=self.epoch + 1 + epochs, samples=more * self.global_batch)

    def _steps_left(self) -> int:
        """In the epoch that is begun."""
        return max(self.count - self.samples, 0) // self.global_batch

    def _steps_per_epoch(self) -> int:
        return self.count // self.global_batch


class ViewsOfPictures(Dataset[Batch]):
    """Pictures as lists of views; the next readable picture stands in for a broken one, which is named.

    Args:
        enough: short side in pixels beyond which a larger picture serves no view.
        attempts: pictures tried before giving up on a place in the batch.
    """

    def __init__(
        self,
        pictures: Pictures,
        transform: Callable[[Image.Image], Views],
        *,
        seed: int,
        enough: int | None = None,
        attempts: int = 1000,
    ) -> None:
        self.pictures = pictures
        self.transform = transform
        self.seed = seed
        self.enough = enough
        self.attempts = attempts

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> Batch:
        epoch, first = key
        broken: list[tuple[str, str]] = []
        for offset in range(min(len(self), self.attempts)):
            index = (first + offset) % len(self)
            try:
                picture = self.pictures.picture(index, at_least=self.enough)
            except BrokenImageError as error:
                broken.append((error.name, error.reason))
                continue
            # Without workers this runs in the training process, whose generators must not notice. A stand-in
            # takes the seed of its place: with its own it would equal its other appearance in the epoch.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, first))
                views, distortions = self.transform(picture)
                return Batch(views, broken, distortions)
        return Batch([], broken)


def _stack(samples: list[Batch]) -> Batch:
    return _together(samples, _stack_tensors)


def _stack_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`; views whose channels lie together in memory are copied as they lie, many times faster."""
    if tensors[0].is_contiguous():
        return torch.stack(tuple(tensors))
    return torch.stack([view.movedim(0, -1) for view in tensors]).movedim(-1, 1)


def _together(samples: Sequence[Batch], put: Callable[[tuple[Tensor, ...]], Tensor]) -> Batch:
    """One tensor per view; no views at all when one of the samples has none: every process's batch is whole."""
    broken = [entry for sample in samples for entry in sample.broken]
    if not all(sample.views for sample in samples):
        return Batch([], broken)
    views = [put(same_view) for same_view in zip(*(s.views for s in samples), strict=True)]
    distortions = tuple(sample.distortions for sample in samples if sample.distortions is not None)
    return Batch(views, broken, put(distortions) if distortions else None)


def begin_worker(worker: int) -> None:
    """For the loading processes of a run, which go on when a signal asks the run to end."""
    outlive_interruption(worker)
    if cv2.getNumThreads() != 1:  # a process that is not a fork
        cv2.setNumThreads(1)


def create_loader(
    pictures: Pictures,
    transform: Callable[[Image.Image], Views],
    order: EpochOrder,
    *,
    enough: int | None = None,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """Batches of the rest of the run, one for each list of the order; the workers live as long as it does."""
    if num_workers:
        # As many workers as cores have one thread each, as torch has it. In a fork of a process that has used OpenCV's
        # threads they cannot be changed: it waits for them for ever.
        cv2.setNumThreads(1)
    return DataLoader(
        ViewsOfPictures(pictures, transform, seed=order.seed, enough=enough),
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=_stack,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, or starting the loader would draw from the run's
        worker_init_fn=begin_worker,
    )


def steady_batches(
    open_loader: Callable[[EpochOrder], Iterable[AnyBatch]],
    order: EpochOrder,
    *,
    join: Callable[[tuple[AnyBatch, ...]], AnyBatch],
    say: Callable[[str], None],
) -> Iterator[AnyBatch]:
    """One batch for each step from workers that may die: see `workers.steady`.

    Args:
        open_loader: the loader of an order.
        join: puts the parts of a step together.
    """

    def rest(done: int) -> Iterator[AnyBatch]:
        steps, parts = divmod(done, order.parts)
        return itertools.islice(open_loader(order.after(steps)), parts, None)

    parts = steady(rest, say=say)
    while step := tuple(itertools.islice(parts, order.parts)):
        yield join(step) if len(step) > 1 else step[0]


def joined(parts: tuple[Batch, ...]) -> Batch:
    """The parts of a step as one batch."""
    return _together(parts, torch.cat)


class BrokenPictures:
    """The pictures found unreadable so far, by name, and the limit on them.

    Args:
        limit: more than this many stop the run; a negative number never does.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def add(self, broken: list[tuple[str, str]]) -> list[str]:
        """Remember them; returns one line for each that is new."""
        fresh = {name: reason for name, reason in broken if name not in self.reasons}
        self.reasons.update(fresh)
        return [f"broken picture skipped: {name}: {reason}" for name, reason in fresh.items()]

    def check(self) -> None:
        """Raises a UserError with the list once there are too many."""
        if 0 <= self.limit < len(self.reasons):
            listed = "\n".join(f"  {name}: {reason}" for name, reason in self.reasons.items())
            raise UserError(
                f"{len(self.reasons)} broken pictures, --max_broken allows {self.limit}; "
                f"mend or remove them, or raise --max_broken:\n{listed}"
            )
