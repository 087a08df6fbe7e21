"""Frozen features of a set of pictures: in order, each picture once, prepared as DINO's evaluations do.

B = pictures, C = channels, N = patch tokens
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm import tqdm

from dino.runtime.backbones import evaluating, tokens
from dino.runtime.distributed import autocast, usable_cores
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures

# The short side before the crop, over the side of the crop: 256 / 224 in DINO's eval_knn.py.
_RESIZE_RATIO = 256 / 224


@dataclass(frozen=True, eq=False)
class Features:
    """One row per readable picture, in the order of the set; n <= the number of pictures.

    Attributes:
        class_token: (n, C) float32, after the final norm.
        patch_mean: (n, C) float32, the mean of the patch tokens after the final norm.
        labels: (n,) int64, or None for a set without classes.
        names: of the n pictures.
        broken: "name: reason" of each picture that is left out.
    """

    class_token: np.ndarray
    patch_mean: np.ndarray
    labels: np.ndarray | None
    names: list[str]
    broken: list[str]


def eval_transform(size: int) -> Callable[[Image.Image], Tensor]:
    """Bicubic resize of the short side, centre crop, ImageNet's mean and deviation: (3, size, size)."""
    return transforms.Compose(
        [
            transforms.Resize(
                round(size * _RESIZE_RATIO), interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )


def extract_features(
    backbone: nn.Module,
    pictures: Pictures,
    *,
    size: int = 224,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    num_workers: int = 0,
    progress: str | None = "features",
) -> Features:
    """Features of every readable picture; each module of the backbone gets its own mode back.

    Args:
        backbone: on `device` already.
        size: side of the square crop, in pixels.
        precision: of the forward pass, `fp32`, `bf16` or `fp16`; what comes back is float32.
        num_workers: processes that decode, at most one per usable core; 0 = this process.
        progress: title of the progress bar, which stays unless it is below another; None = no bar.

    Raises:
        UserError: no picture can be read.
    """
    device = torch.device(device)
    loader = DataLoader(
        _Prepared(pictures, eval_transform(size)),
        batch_size=batch_size,
        num_workers=min(num_workers, usable_cores()),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: measuring in mid-training leaves the run's random state alone
    )
    kept: list[int] = []
    broken: list[str] = []
    class_token: list[np.ndarray] = []
    patch_mean: list[np.ndarray] = []
    bar = tqdm(
        total=len(pictures),
        desc=progress,
        unit="img",
        disable=progress is None,
        leave=None,
        dynamic_ncols=True,
    )
    # no_grad and not inference_mode: a backbone may keep what it computes here (position features of a size),
    # and inference tensors cannot be trained with later.
    with bar, evaluating(backbone), torch.no_grad():
        for indices, images, messages in loader:
            kept += indices
            broken += messages
            if images is not None:
                with autocast(device, precision):
                    class_BC, patches_BNC = tokens(backbone, images.to(device, non_blocking=True))
                class_token.append(class_BC.float().cpu().numpy())
                patch_mean.append(patches_BNC.float().mean(dim=1).cpu().numpy())
            bar.update(len(indices) + len(messages))
    if not kept:
        raise UserError(
            f"none of the {len(pictures)} pictures can be read" + "".join(f"; {b}" for b in broken[:1])
        )
    return Features(
        class_token=np.concatenate(class_token),
        patch_mean=np.concatenate(patch_mean),
        labels=None if pictures.labels is None else np.asarray(pictures.labels, dtype=np.int64)[kept],
        names=[pictures.name(index) for index in kept],
        broken=broken,
    )


class _Prepared(Dataset[tuple[int, Tensor | None, str]]):
    """(index, image, "") of a readable picture, (index, None, what is wrong) of a broken one."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor]) -> None:
        self._pictures = pictures
        self._transform = transform

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, self._transform(self._pictures.picture(index)), ""
        except BrokenImageError as error:
            return index, None, str(error)


def _collate(items: list[tuple[int, Tensor | None, str]]) -> tuple[list[int], Tensor | None, list[str]]:
    images = [image for _, image, _ in items if image is not None]
    indices = [index for index, image, _ in items if image is not None]
    broken = [message for _, image, message in items if image is None]
    return indices, torch.stack(images) if images else None, broken
