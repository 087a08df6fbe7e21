"""Batches of views in an order that depends on the seed alone: the same for any number of processes or workers.

Step s takes places [s * batch, (s + 1) * batch) of its epoch's permutation, split over the ranks; every picture's
distortions are seeded by (seed, epoch, picture). A run therefore resumes at any step without replaying anything.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures

Key: TypeAlias = tuple[int, int]  # epoch, index of the picture


class Batch(NamedTuple):
    """Views (B, 3, H, W), one tensor per view, and the pictures that could not be read, as (name, reason)."""

    views: list[Tensor]
    broken: list[tuple[str, str]]


def mixed_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class EpochOrder(Sampler[list[Key]]):
    """This rank's part of every global batch, from `first_step` to the end of the run.

    Args:
        count: pictures in the set.
        batch_size: pictures of one rank in one step.
        steps: steps of the whole run.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        steps: int,
        first_step: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.count = count
        self.batch_size = batch_size
        self.steps = steps
        self.first_step = first_step
        self.rank = rank
        self.world_size = world_size
        self.seed = seed

    def __len__(self) -> int:
        return max(self.steps - self.first_step, 0)

    def __iter__(self) -> Iterator[list[Key]]:
        global_batch = self.batch_size * self.world_size
        per_epoch = self.count // global_batch
        for epoch in itertools.count(self.first_step // per_epoch):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            start = max(self.first_step - epoch * per_epoch, 0)
            for step in range(start, min(per_epoch, self.steps - epoch * per_epoch)):
                places = order[step * global_batch : (step + 1) * global_batch][self.rank :: self.world_size]
                yield [(epoch, int(index)) for index in places]
            if (epoch + 1) * per_epoch >= self.steps:
                return


class ViewsOfPictures(Dataset[Batch]):
    """Pictures as lists of views; the next readable picture stands in for a broken one, which is named.

    Args:
        enough: short side in pixels beyond which a larger picture serves no view.
        attempts: pictures tried before giving up on a place in the batch.
    """

    def __init__(
        self,
        pictures: Pictures,
        transform: Callable[[Image.Image], list[Tensor]],
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
                return Batch(self.transform(picture), broken)
        return Batch([], broken)


def _stack(samples: list[Batch]) -> Batch:
    """One tensor per view; no views at all when no picture could be read."""
    readable = [sample.views for sample in samples if sample.views]
    views = [torch.stack(same_view) for same_view in zip(*readable, strict=True)]
    return Batch(views, [entry for sample in samples for entry in sample.broken])


def create_loader(
    pictures: Pictures,
    transform: Callable[[Image.Image], list[Tensor]],
    order: EpochOrder,
    *,
    enough: int | None = None,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    """Batches of the whole run; the workers live as long as it does."""
    return DataLoader(
        ViewsOfPictures(pictures, transform, seed=order.seed, enough=enough),
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=_stack,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, or starting the loader would draw from the run's
    )


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
