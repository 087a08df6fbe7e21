"""Multi-crop: two global views and several local ones of a picture, each with its distortions (DINO, section 3.1).

All randomness comes from torch's global generator, so that a seed per picture fixes every view of it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino.distortions import (
    DRAWS,
    PAPER_JITTER,
    Distortion,
    Jitter,
    Pixels,
    distort,
    draw_distortion,
    normalised,
)

_ASPECTS = (3 / 4, 4 / 3)  # width to height of a crop
_ATTEMPTS = 10
# Uniform numbers of a view: two for each attempt at a box, two for its place, one for the flip, and the distortion's.
_BOX_DRAWS = 2 * _ATTEMPTS + 2
_VIEW_DRAWS = _BOX_DRAWS + 1 + DRAWS


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Views(NamedTuple):
    """What a picture gives, in 8 bits.

    Attributes:
        views: RGB, one (3, side, side) uint8 tensor for each view. In memory the channels of a pixel lie together as
            long as something is to be done to them.
        distortions: (views, fields of a `Distortion`) float32: what is to be done to them; None = nothing.
    """

    views: list[Tensor]
    distortions: Tensor | None = None


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

    def draw(self, uniform: Sequence[float], height: int, width: int) -> tuple[Box, bool, Distortion]:
        """Box in a picture of height x width pixels, whether it is flipped, and distortion of one view."""
        distortion = draw_distortion(
            uniform[_BOX_DRAWS + 1 :],
            jitter=self.jitter,
            grayscale=self.grayscale,
            blur=self.blur,
            solarize=self.solarize,
        )
        box = draw_box(uniform[:_BOX_DRAWS], height, width, self.scale)
        return box, uniform[_BOX_DRAWS] < 0.5, distortion


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

    def __call__(self, picture: Image.Image) -> list[Tensor]:
        """RGB picture of any size -> one normalised (3, side, side) float32 tensor per view."""
        return [normalised(view) for view in self.distorted(picture).views]

    def distorted(self, picture: Image.Image) -> Views:
        """The same views before they are normalised, in a quarter of the memory."""
        return Views([_planes(distort(crop, distortion)) for crop, distortion in self._draw(picture)])

    def cropped(self, picture: Image.Image) -> Views:
        """The same views before they are distorted, and how they are to be."""
        crops, distortions = zip(*self._draw(picture), strict=True)
        views = [torch.from_numpy(crop).permute(2, 0, 1) for crop in crops]
        return Views(views, torch.tensor(distortions, dtype=torch.float32))

    def _draw(self, picture: Image.Image) -> Iterator[tuple[Pixels, Distortion]]:
        pixels = np.asarray(picture)
        # One call for all views: each costs as much as a small crop.
        uniform = torch.rand(len(self.views), _VIEW_DRAWS).tolist()
        for view, of_view in zip(self.views, uniform, strict=True):
            box, flip, distortion = view.draw(of_view, *pixels.shape[:2])
            crop = crop_resized(pixels, box, view.size)
            yield cv2.flip(crop, 1) if flip else crop, distortion


def draw_box(uniform: Sequence[float], height: int, width: int, scale: tuple[float, float]) -> Box:
    """Area evenly from the `scale`, aspect evenly in its logarithm, anywhere in the picture (Inception's crop).

    Where ten such boxes in a row do not fit, the largest in the middle whose aspect is allowed; as in torchvision's
    RandomResizedCrop.

    Args:
        uniform: 22 numbers in [0, 1): area and aspect of ten attempts, then the place.
        height, width: of the picture in pixels.
        scale: share of the picture's area, (least, most).
    """
    *attempts, down, across = uniform
    least, most = scale
    low, high = (math.log(aspect) for aspect in _ASPECTS)
    for of_area, of_aspect in zip(attempts[::2], attempts[1::2], strict=True):
        area = height * width * (least + of_area * (most - least))
        aspect = math.exp(low + of_aspect * (high - low))
        rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < columns <= width:
            return Box(int(down * (height - rows + 1)), int(across * (width - columns + 1)), rows, columns)
    narrowest, widest = _ASPECTS
    rows = round(width / narrowest) if width < narrowest * height else height
    columns = round(height * widest) if width > widest * height else width
    return Box((height - rows) // 2, (width - columns) // 2, rows, columns)


def crop_resized(pixels_HW3: Pixels, box: Box, size: int) -> Pixels:
    """A part of the picture (rows, columns, 3) uint8 -> (size, size, 3) uint8: bicubic, with antialiasing.

    Within one level of Pillow's resampling of the rows, then of the columns, whose way of counting in 8 bits torch has
    vectorised.
    """
    top, left, height, width = box
    # In a copy of its own, with the channels of a pixel together, torch is at its fastest.
    part = torch.from_numpy(pixels_HW3[top : top + height, left : left + width].copy())
    crop = F.interpolate(part[None].permute(0, 3, 1, 2), (size, size), mode="bicubic", antialias=True)
    return crop[0].permute(1, 2, 0).contiguous().numpy()


def _planes(pixels_HW3: Pixels) -> Tensor:
    planes = np.empty((3, *pixels_HW3.shape[:2]), np.uint8)
    cv2.split(pixels_HW3, list(planes))
    return torch.from_numpy(planes)
