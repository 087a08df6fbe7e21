"""The training pictures of DINO's linear evaluation: random crops and flips, every picture once an epoch.

The order depends on seed and epoch alone, and a picture's crop on seed, epoch and picture.
"""

import math
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms

from dino.evaluation.extraction import to_normalised_tensor
from dino.loader import mixed_seed
from dino.runtime import distributed
from dino.runtime.images import BrokenImageError
from dino.runtime.pictures import Pictures

Batch = tuple[Tensor | None, Tensor, list[str]]


class RandomCrops:
    """This process's batches of every epoch.

    Args:
        size: side of the crops in pixels.
        batch_size: pictures of a step of this process.
        num_workers: loading processes.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        size: int,
        batch_size: int,
        seed: int,
        num_workers: int,
        pin_memory: bool = False,
    ) -> None:
        self._crops = _Crops(pictures, _random_crop(size), seed)
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        # As in DINO a few pictures come twice where they cannot be shared out evenly.
        self._sampler: DistributedSampler[_Crops] = DistributedSampler(
            self._crops, num_replicas=distributed.world_size(), rank=distributed.rank(), seed=seed
        )

    def __len__(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self._sampler) / self._batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Images (B, 3, size, size), None where none can be read; labels (B,); "name: reason" of broken pictures."""
        self._sampler.set_epoch(number)
        self._crops.epoch = number  # workers are started anew for every epoch, and so see it
        return iter(
            DataLoader(
                self._crops,
                batch_size=self._batch_size,
                sampler=self._sampler,
                num_workers=self._num_workers,
                collate_fn=_collate,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # its own, or starting the loader would draw from another's
            )
        )


def _random_crop(size: int) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            *to_normalised_tensor(),
        ]
    )


class _Crops(Dataset[tuple[Tensor | None, int, str]]):
    """A random crop and the label of a picture, or what is wrong with it; the same for the same seed and epoch."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self._pictures = pictures
        self._transform = transform
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        assert self._pictures.labels is not None
        label = self._pictures.labels[index]
        try:
            picture = self._pictures.picture(index)
        except BrokenImageError as error:
            return None, label, str(error)
        # Without workers this runs in the process that everything else draws from.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self._seed, self.epoch, index))
            return self._transform(picture), label, ""


def _collate(items: list[tuple[Tensor | None, int, str]]) -> tuple[Tensor | None, Tensor, list[str]]:
    images = [image for image, _, _ in items if image is not None]
    labels = torch.tensor([label for image, label, _ in items if image is not None])
    return torch.stack(images) if images else None, labels, [message for _, _, message in items if message]
