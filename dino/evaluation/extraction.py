"""Frozen features of pictures: in order, each picture once, prepared as DINO's evaluations do.

B = pictures of a batch, C = channels, N = patch tokens
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dino.evaluation.kinds import CLASS_TOKEN, LAST_BLOCKS, LAST_BLOCKS_COUNT, PATCH_MEAN, PATCH_TOKENS
from dino.runtime import distributed
from dino.runtime.backbones import evaluating, last_blocks, reads_blocks, tokens
from dino.runtime.images import IMAGENET_MEAN, IMAGENET_STD, BrokenImageError
from dino.runtime.interruption import Interruption, outlive_interruption
from dino.runtime.options import Interrupted, UserError
from dino.runtime.pictures import Pictures
from dino.runtime.progress import say
from dino.runtime.workers import steady

Result = TypeVar("Result")

# The short side before the crop, over the side of the crop: 256 / 224 in DINO's evaluations.
RESIZE_RATIO = 256 / 224


@dataclass(frozen=True, eq=False)
class Features:
    """One row per readable picture, in the order of the set; n <= the number of pictures.

    Attributes:
        rows: by kind, (n, C), or (n, N, C) for all patch tokens; float32, or float16 from a forward pass in
            half precision, whose error is larger than this rounding.
        labels: (n,) int64, or None for a set without classes.
        names: of the n pictures.
        broken: "name: reason" of each picture that is left out.
    """

    rows: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    names: list[str]
    broken: list[str]

    def __getitem__(self, kind: str) -> np.ndarray:
        return self.rows[kind]


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes what the backbone sees.

    Attributes:
        size: side in pixels of the centre crop.
        resize_ratio: short side before the crop over `size`.
        precision: of the forward pass, `fp32`, `bf16` or `fp16`.
    """

    size: int = 224
    resize_ratio: float = RESIZE_RATIO
    precision: str = "fp32"

    @property
    def dtype(self) -> np.dtype[np.float32] | np.dtype[np.float16]:
        """What rows are kept in: full precision stays whole, half precision takes half the room."""
        return np.dtype(np.float32) if self.precision == "fp32" else np.dtype(np.float16)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Bicubic resize of the short side, centre crop, ImageNet's mean and deviation: (3, size, size)."""
        from torchvision import transforms  # takes over a second

        short_side = round(self.size * self.resize_ratio)
        return transforms.Compose(
            [
                transforms.Resize(short_side, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(self.size),
                *to_normalised_tensor(),
            ]
        )


def to_normalised_tensor() -> list[Callable[..., Tensor]]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def standard_kinds(backbone: nn.Module) -> tuple[str, ...]:
    """What k-NN and linear probes are given: of a ViT its last blocks too."""
    return (CLASS_TOKEN, PATCH_MEAN, *((LAST_BLOCKS,) if reads_blocks(backbone) else ()))


def readable(pictures: Pictures, broken: Mapping[int, str]) -> np.ndarray:
    """Places of the pictures that are not broken, int64.

    Raises:
        UserError: there are none.
    """
    kept = np.delete(np.arange(len(pictures)), sorted(broken))
    if not len(kept):
        first = "".join(f"; {message}" for message in list(broken.values())[:1])
        raise UserError(f"none of the {len(pictures)} pictures can be read{first}")
    return kept


def labels_of(pictures: Pictures, kept: np.ndarray) -> np.ndarray | None:
    return None if pictures.labels is None else np.asarray(pictures.labels, dtype=np.int64)[kept]


@dataclass(frozen=True, eq=False)
class Extractor:
    """Shows pictures to a backbone; each module of the backbone gets its own mode back.

    Attributes:
        backbone: on `device` already.
        batch_size: pictures per forward pass.
        num_workers: processes that decode, at most one per usable core; 0 = this process.
        interruption: asked between batches; a signal that has come ends the work as `Interrupted`.
    """

    backbone: nn.Module
    preparation: Preparation = Preparation()
    batch_size: int = 64
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - cannot be changed
    num_workers: int = 0
    interruption: Interruption | None = None

    def extract(
        self,
        pictures: Pictures,
        kinds: Sequence[str] = (CLASS_TOKEN, PATCH_MEAN),
        *,
        progress: str | None = "features",
    ) -> Features:
        """Features of every readable picture, in memory. All processes call it, share the pictures, and get all.

        Args:
            kinds: see `dino.evaluation.kinds`.
            progress: title of the progress bar, which stays unless it is below another; None = no bar.

        Raises:
            UserError: no picture can be read, or features are not finite.
        """
        dtype = self.preparation.dtype
        shapes = self.row_shapes(kinds)
        rows = {kind: np.empty((len(pictures), *shape), dtype) for kind, shape in shapes.items()}
        part = self.part_of(len(pictures), distributed.rank(), distributed.world_size())
        with distributed.together():
            own = self.fill(rows, pictures, part, progress=progress if distributed.is_main() else None)
        broken = dict(distributed.gather(list(own.items())))
        if distributed.world_size() > 1:
            own_rows = {kind: values[part.start : part.stop] for kind, values in rows.items()}
            for start, of_part in distributed.gather([(part.start, own_rows)]):
                for kind, values in of_part.items():
                    rows[kind][start : start + len(values)] = values
        kept = readable(pictures, broken)
        return Features(
            rows={kind: value[kept] for kind, value in rows.items()} if broken else rows,
            labels=labels_of(pictures, kept),
            names=[pictures.name(index) for index in kept],
            broken=list(broken.values()),
        )

    def row_shapes(self, kinds: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shape of one picture's row of each kind, found by showing the backbone an empty picture.

        Raises:
            UserError: the backbone takes none of that size, or has no such features.
        """
        side = self.preparation.size
        empty = torch.zeros(1, 3, side, side, device=self.device)
        try:
            with torch.no_grad():
                rows = self.run(empty, partial(_rows, kinds=kinds))
        except torch.OutOfMemoryError:
            raise
        # Of timm's many networks each has its own.
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise UserError(
                f"{type(self.backbone).__name__} makes no features of a picture of {side} x {side} pixels ({error}): "
                "try the --image_size that it was made for, or another --arch"
            ) from error
        return {kind: tuple(value.shape[1:]) for kind, value in rows.items()}

    def part_of(self, count: int, rank: int, processes: int) -> range:
        """The pictures of a set of `count` that a process shows to its backbone.

        Whole batches: a network's last digits may depend on the pictures beside, and must not on the processes.
        """
        batches = -(-count // self.batch_size)
        first, end = (self.batch_size * (batches * place // processes) for place in (rank, rank + 1))
        return range(first, min(end, count))

    def fill(
        self, rows: Mapping[str, np.ndarray], pictures: Pictures, indices: range, *, progress: str | None
    ) -> dict[int, str]:
        """Write the rows of the pictures at `indices` into their places.

        Args:
            rows: by kind, an array for the whole set; a memory map may be shared with other processes.

        Returns:
            "name: reason" of the pictures that cannot be read, by place.

        Raises:
            UserError: features are not finite.
        """
        broken: dict[int, str] = {}
        kinds = tuple(rows)
        with torch.no_grad():
            for places, images, messages in self.batches(pictures, indices, progress=progress):
                if self.interruption and self.interruption.signal_name:
                    raise Interrupted(self.interruption.signal_name)
                broken.update(messages)
                if images is None:
                    continue
                for kind, value in self.run(images, partial(_rows, kinds=kinds)).items():
                    with np.errstate(over="ignore"):  # what is beyond float16 is told below
                        values = value.cpu().numpy().astype(self.preparation.dtype)
                    _check(values, pictures, places)
                    rows[kind][places] = values
        return broken

    def batches(
        self, pictures: Pictures, indices: range, *, progress: str | None
    ) -> Iterator[tuple[list[int], Tensor | None, dict[int, str]]]:
        """Places of the readable pictures of a batch, their images (B, 3, size, size), and what is wrong with others.

        The images are None where none can be read.
        """

        def rest(done: int) -> "DataLoader[Any]":
            return DataLoader(
                _Prepared(pictures, indices[done * self.batch_size :], self.preparation.transform()),
                batch_size=self.batch_size,
                num_workers=min(self.num_workers, distributed.usable_cores()),
                collate_fn=_collate,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # its own: measuring in mid-training leaves the run's random state alone
                worker_init_fn=outlive_interruption,
            )

        title, quiet, total = progress, progress is None, len(indices)
        with tqdm(total=total, desc=title, unit="img", disable=quiet, leave=None, dynamic_ncols=True) as bar:
            for places, images, messages in steady(rest, say=say):
                yield places, images, messages
                bar.update(len(places) + len(messages))

    def run(self, images: Tensor, function: Callable[[nn.Module, Tensor], Result]) -> Result:
        """What the function makes of the backbone in eval mode and of images, which it gets on the device.

        Gradients are the caller's choice: no_grad and not inference_mode, since a backbone may keep what it computes
        here (position features of a size), and inference tensors cannot be trained with later.
        """
        with evaluating(self.backbone), distributed.autocast(self.device, self.preparation.precision):
            return function(self.backbone, images.to(self.device, non_blocking=True))


def _rows(backbone: nn.Module, images: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Each kind's rows (B, ...), float32."""
    values = {}
    if LAST_BLOCKS in kinds:
        blocks = last_blocks(backbone, images, LAST_BLOCKS_COUNT)
        class_BC, patches_BNC = blocks[-1]
        values[LAST_BLOCKS] = torch.cat([class_token for class_token, _ in blocks], dim=1)
    else:
        class_BC, patches_BNC = tokens(backbone, images)
    values |= {CLASS_TOKEN: class_BC, PATCH_MEAN: patches_BNC.float().mean(dim=1), PATCH_TOKENS: patches_BNC}
    return {kind: values[kind].float() for kind in kinds}


def _check(rows: np.ndarray, pictures: Pictures, places: Sequence[int]) -> None:
    finite = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
    if not finite.all():
        raise UserError(
            f"the features of {pictures.name(places[int(finite.argmin())])} are not finite (nan or infinity): "
            "the weights are damaged, or the precision is too low (try --precision fp32)"
        )


class _Prepared(Dataset[tuple[int, Tensor | None, str]]):
    """(index, image, "") of a readable picture, (index, None, what is wrong) of a broken one."""

    def __init__(
        self, pictures: Pictures, indices: range, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self._pictures = pictures
        self._indices = indices
        self._transform = transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None, str]:
        index = self._indices[place]
        try:
            return index, self._transform(self._pictures.picture(index)), ""
        except BrokenImageError as error:
            return index, None, str(error)


def _collate(items: list[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor | None, dict[int, str]]:
    images = [image for _, image, _ in items if image is not None]
    places = [index for index, image, _ in items if image is not None]
    broken = {index: message for index, image, message in items if image is None}
    return places, torch.stack(images) if images else None, broken
