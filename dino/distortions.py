"""What is done to the colours of a view (DINO, section 3.1; BYOL, appendix B): drawn first, then applied.

Drawing and applying are two functions, so that what was drawn can be applied here, to one view with OpenCV, or to
batches on a device (`dino.batched_distortions`). Both keep 8 bits between the operations, as Pillow does, and stay
within rounding of it. Letters: H, W = rows and columns of a view.
"""

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
import torch
from torch import Tensor

from dino.runtime.images import IMAGENET_MEAN, IMAGENET_STD

Pixels: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Jitter: TypeAlias = tuple[float, float, float, float]  # brightness, contrast, saturation, hue
PAPER_JITTER: Jitter = (0.4, 0.4, 0.2, 0.1)

# The places of these in an order of the jitter.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(itertools.permutations(range(4)))

LUMA = (0.299, 0.587, 0.114)  # of ITU-R 601, as in Pillow's conversion to grey
SOLARIZE_THRESHOLD = 128
HUES = 256

# Uniform numbers that a distortion is drawn from.
DRAWS = 10

_JITTERED = 0.8
_BLUR_RADIUS = (0.1, 2.0)
_BOX_REACH = 2  # pixels to each side, at the largest radius of blur
BLUR_REACH = 3 * _BOX_REACH

_BLUR_STEPS = 1000  # in a pixel
_NO_WEIGHT = 1e-5

# OpenCV rounds, Pillow cuts off what is behind the point.
_CUT_OFF = 0.499

_TO_GREY = np.array([LUMA] * 3, np.float32)
_SOLARIZED = np.arange(256, dtype=np.uint8)
_SOLARIZED[SOLARIZE_THRESHOLD:] = 255 - _SOLARIZED[SOLARIZE_THRESHOLD:]


class Distortion(NamedTuple):
    """What is done to one view, in this order; all of it can be a row of floats.

    Attributes:
        order: of the four that follow: an index of `ORDERS`.
        brightness, contrast, saturation: factors, 1 for none; as in `PIL.ImageEnhance`.
        hue: turn of the colour circle, in [-0.5, 0.5].
        grayscale: whether all colour is lost.
        blur: standard deviation in pixels, 0 for none, at most 2.
        solarize: whether bright pixels are inverted.
    """

    order: int = 0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grayscale: bool = False
    blur: float = 0.0
    solarize: bool = False


def draw_distortion(
    uniform: Sequence[float], *, jitter: Jitter, grayscale: float, blur: float, solarize: float
) -> Distortion:
    """From `DRAWS` uniform numbers in [0, 1).

    Args:
        jitter: strength of the change of brightness, contrast, saturation and hue; applied to 4 of 5 views.
        grayscale, blur, solarize: their probabilities.
    """
    jittered, order, *colours, grey, blurred, radius, solarized = uniform
    *strengths, turn = jitter if jittered < _JITTERED else (0.0, 0.0, 0.0, 0.0)
    least = [max(0.0, 1 - strength) for strength in strengths]
    brightness, contrast, saturation = (
        low + u * (1 + s - low) for low, s, u in zip(least, strengths, colours[:3], strict=True)
    )
    low, high = _BLUR_RADIUS
    return Distortion(
        int(order * len(ORDERS)),
        brightness,
        contrast,
        saturation,
        hue=turn * (2 * colours[3] - 1),
        grayscale=grey < grayscale,
        blur=low + radius * (high - low) if blurred < blur else 0.0,
        solarize=solarized < solarize,
    )


def distort(pixels_HW3: Pixels, distortion: Distortion) -> Pixels:
    """The view (rows, columns, 3), uint8 RGB, distorted: a new array, or the same where nothing is done to it."""
    pixels = pixels_HW3
    factors = distortion[1:5]
    for operation in ORDERS[distortion.order]:
        factor = factors[operation]
        if operation == HUE and factor != 0:
            pixels = _turn_hue(pixels, factor)
        elif operation != HUE and factor != 1:
            pixels = cv2.transform(pixels, _blend(pixels, operation, factor))
    if distortion.grayscale:
        pixels = cv2.transform(pixels, _TO_GREY)
    if distortion.blur:
        pixels = _blur(pixels, distortion.blur)
    if distortion.solarize:
        pixels = cv2.LUT(pixels, _SOLARIZED)
    return pixels


def normalised(views: Tensor) -> Tensor:
    """Views (..., 3, H, W) uint8 -> float32 with ImageNet's mean and deviation, on the same device."""
    scale, offset = _normalisation(views.device)
    return views.float().mul_(scale).sub_(offset)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sent to a device once, as the host would wait for that."""
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (1 / (255 * deviation)).float().to(device), (mean / deviation).float().to(device)


def hue_steps(turn: float) -> int:
    """A turn of the colour circle in its `HUES` steps, cut off to whole ones, as Pillow's hues have 8 bits too."""
    return int(turn * (HUES - 1))


def blur_kernels(deviations: Floats) -> Floats:
    """Pillow's Gaussian blurs (n) -> weights (n, BLUR_REACH + 1) from the middle outwards.

    Deviations are taken in steps of a thousandth of a pixel, for which the weights are worked out once.
    """
    return _all_blur_kernels()[np.rint(deviations * _BLUR_STEPS).astype(np.intp)]


@cache
def _all_blur_kernels() -> Floats:
    """Three box blurs of the Gaussian's variance, whose ends are parts of pixels.

    P. Gwosdek, S. Grewenig, A. Bruhn and J. Weickert, "Theoretical foundations of Gaussian convolution by extended
    box filtering", 2011.
    """
    variance = np.square(np.arange(round(_BLUR_RADIUS[1] * _BLUR_STEPS) + 1)[:, None] / _BLUR_STEPS)
    whole = np.floor((np.sqrt(4 * variance + 1) - 1) / 2)  # pixels to each side
    inner = whole * (whole + 1) / 3  # variance without the ends
    ends = (variance / 3 - inner) / (2 * (np.square(whole + 1) - inner))
    away = np.abs(np.arange(2 * BLUR_REACH + 1) - BLUR_REACH)
    box = np.where(away <= whole, (1 - 2 * ends) / (2 * whole + 1), np.where(away == whole + 1, ends, 0.0))
    spectrum = np.fft.rfft(np.fft.ifftshift(box, axes=1), axis=1)
    return np.fft.irfft(spectrum**3, 2 * BLUR_REACH + 1, axis=1)[:, : BLUR_REACH + 1]


def _blend(pixels: Pixels, operation: int, factor: float) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """The 3 x 4 matrix that blends the view with black, with its mean grey, or with its own grey."""
    red = green = blue = 0.0
    add = -_CUT_OFF
    if operation == CONTRAST:
        add += (1 - factor) * int(np.dot(LUMA, cv2.mean(pixels)[:3]) + 0.5)
    elif operation == SATURATION:
        red, green, blue = ((1 - factor) * weight for weight in LUMA)
    rows = (
        (factor + red, green, blue, add),
        (red, factor + green, blue, add),
        (red, green, factor + blue, add),
    )
    return np.array(rows, np.float32)


def _turn_hue(pixels: Pixels, turn: float) -> Pixels:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(hue_steps(turn) % HUES)  # runs over from the circle's end to its start
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _blur(pixels: Pixels, deviation: float) -> Pixels:
    half = blur_kernels(np.array(deviation))
    half = half[half > _NO_WEIGHT]
    kernel = np.concatenate([half[:0:-1], half])
    return cv2.sepFilter2D(pixels, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
