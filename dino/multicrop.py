"""Multi-crop: two global views and several local ones of a picture, each with its distortions (DINO, section 3.1).

All randomness comes from torch's global generator, so that a seed per picture fixes every view of it.
"""

from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from PIL import Image, ImageFilter
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms

Jitter: TypeAlias = tuple[float, float, float, float]  # brightness, contrast, saturation, hue
PAPER_JITTER: Jitter = (0.4, 0.4, 0.2, 0.1)

_SOLARIZE_THRESHOLD = 128


class GaussianBlur:
    """Blur with a radius drawn evenly from `radius` (pixels), with probability `p`."""

    def __init__(self, p: float, radius: tuple[float, float] = (0.1, 2.0)) -> None:
        self.p = p
        self.radius = radius

    def __call__(self, picture: Image.Image) -> Image.Image:
        if torch.rand(()).item() >= self.p:
            return picture
        low, high = self.radius
        return picture.filter(ImageFilter.GaussianBlur(low + (high - low) * torch.rand(()).item()))


@dataclass(frozen=True)
class View:
    """How one view is made.

    Attributes:
        size: side of the square crop in pixels.
        scale: share of the picture's area that the crop takes, (least, most).
        blur: probability of Gaussian blur.
        solarize: probability of inverting the bright pixels.
        jitter: strength of the change of brightness, contrast, saturation and hue.
        grayscale: probability of losing all colour.
    """

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float
    jitter: Jitter = PAPER_JITTER
    grayscale: float = 0.2

    def transform(self) -> transforms.Compose:
        """A callable from an RGB picture to a normalised float32 tensor (3, size, size)."""
        colour = transforms.ColorJitter(*self.jitter)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    self.size, scale=self.scale, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([colour], p=0.8),
                transforms.RandomGrayscale(self.grayscale),
                GaussianBlur(self.blur),
                transforms.RandomSolarize(_SOLARIZE_THRESHOLD, p=self.solarize),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )


class MultiCrop:
    """A picture -> its views, the two global ones first.

    Args:
        global_size, local_size: side of the crops in pixels.
        global_scale, local_scale: share of the picture's area, (least, most).
        local_number: local views; 0 leaves the two global ones.
        jitter: strength of the change of brightness, contrast, saturation and hue.
        grayscale: probability of losing all colour.
        blur: scales the probability of blur, 1 as in the paper, 0 for none: small crops suffer from it.
    """

    def __init__(
        self,
        *,
        global_size: int,
        local_size: int,
        global_scale: tuple[float, float],
        local_scale: tuple[float, float],
        local_number: int,
        jitter: Jitter = PAPER_JITTER,
        grayscale: float = 0.2,
        blur: float = 1.0,
    ) -> None:
        of_picture = partial(View, jitter=jitter, grayscale=grayscale)
        first = of_picture(global_size, global_scale, blur=1.0 * blur, solarize=0.0)
        second = of_picture(global_size, global_scale, blur=0.1 * blur, solarize=0.2)
        local = of_picture(local_size, local_scale, blur=0.5 * blur, solarize=0.0)
        self.views = [first, second, *[local] * local_number]
        self._transforms = [view.transform() for view in self.views]

    def __call__(self, picture: Image.Image) -> list[Tensor]:
        """RGB picture of any size -> one (3, side, side) float32 tensor per view."""
        return [transform(picture) for transform in self._transforms]
