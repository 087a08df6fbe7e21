"""Pictures with what is to be learned of them, in an order and with distortions that depend on the seed alone."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dino.loader import EpochOrder, Key, begin_worker, mixed_seed
from dino.runtime.images import BrokenImageError

Sample = TypeVar("Sample")


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
        content: of all samples, as the loader's `collate` puts them together; None where one of them is missing.
        broken: name and reason of each picture that could not be read.
    """

    content: Any
    broken: list[tuple[str, str]]

    @property
    def whole(self) -> bool:
        """Whether there is something to compute with."""
        return self.content is not None


class Samples(Dataset[tuple[Sample | None, list[tuple[str, str]]]], Generic[Sample]):
    """One distorted sample for each key; the next readable picture stands in for a broken one, which is named.

    Args:
        count: pictures in the set.
        read: of the picture with an index, its sample, with random draws from torch's, numpy's and Python's global
            generators; raises BrokenImageError.
        attempts: pictures tried before giving up on a place in the batch.
    """

    def __init__(self, count: int, read: Callable[[int], Sample], *, seed: int, attempts: int = 1000) -> None:
        self.count = count
        self.read = read
        self.seed = seed
        self.attempts = attempts

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key) -> tuple[Sample | None, list[tuple[str, str]]]:
        turn, first = key
        broken: list[tuple[str, str]] = []
        for offset in range(min(len(self), self.attempts)):
            # A stand-in takes the seed of its place: with its own it would equal its other appearance.
            with drawing(mixed_seed(self.seed, turn, first)):
                try:
                    return self.read((first + offset) % len(self)), broken
                except BrokenImageError as error:
                    broken.append((error.name, error.reason))
        return None, broken


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Draws from all global generators of the CPU that depend on the seed alone, and of which nobody else notices."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def create_loader(
    samples: Samples[Sample],
    collate: Callable[[list[Sample]], Any],
    order: EpochOrder,
    *,
    num_workers: int,
    pin_memory: bool,
) -> Iterable[Batch]:
    """Batches of the rest of the run, one for each list of the order; the workers live as long as it does."""
    if num_workers:
        cv2.setNumThreads(1)  # before workers are forked: see `dino.loader.create_loader`
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=_Collate(collate),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own, or starting the loader would draw from the run's
        worker_init_fn=begin_worker,
    )
    return loader


class _Collate(Generic[Sample]):
    """No content at all when a sample is missing: every process's batch is whole."""

    def __init__(self, collate: Callable[[list[Sample]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[tuple[Sample | None, list[tuple[str, str]]]]) -> Batch:
        found = [sample for sample, _ in samples if sample is not None]
        broken = [entry for _, entries in samples for entry in entries]
        return Batch(self.collate(found) if len(found) == len(samples) else None, broken)
