"""Training views of classification, by timm: crops, RandAugment or colour jitter, random erasing (DeiT, section 6)."""

from collections.abc import Callable
from typing import cast

from PIL.Image import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

# Pictures of this side or less, such as CIFAR's own, are padded and shifted instead of resized.
_SMALL_SIDE = 32
_SHIFT = 4


def training_view(
    size: int,
    *,
    scale: tuple[float, float],
    color_jitter: float,
    auto_augment: str,
    interpolation: str,
    erase: float,
    erase_mode: str,
    erase_count: int,
) -> Callable[[Image], Tensor]:
    """A picture to a view (3, size, size), with ImageNet's mean and deviation.

    It draws from torch's, numpy's and Python's global generators.

    Args:
        scale: share of the picture in the crop.
        color_jitter: strength; timm leaves it out where `auto_augment` is on.
        auto_augment: RandAugment or AutoAugment as timm writes them; `none` = off.
        erase: probability of erasing a rectangle.
    """
    policy = None if auto_augment.lower() in ("", "none") else auto_augment
    transform = create_transform(
        input_size=size,
        is_training=True,
        scale=scale,
        color_jitter=color_jitter,
        auto_augment=policy,
        interpolation=interpolation,
        re_prob=erase,
        re_mode=erase_mode,
        re_count=erase_count,
    )
    if size <= _SMALL_SIDE:
        transform.transforms[0] = transforms.Compose(
            [transforms.Resize(size), transforms.RandomCrop(size, padding=_SHIFT)]
        )
    return cast(Callable[[Image], Tensor], transform)
