"""What a segmentation network sees: distorted crops in training, the resized picture in a test.

Pictures are (rows, cols, 3) uint8 RGB, masks (rows, cols) int16 places of classes, `VOID` where none counts. Random
draws come from torch's global generator alone.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino.downstream.segmentation.classes import VOID, PlaceArray
from dino.runtime.images import IMAGENET_MEAN, IMAGENET_STD

ByteArray = NDArray[np.uint8]

_CROPS_TRIED = 10
_HUES = 180  # OpenCV's degrees, of 2 each
_DISTORTED = 0.5  # part of the pictures, for each of the four distortions
_BRIGHTNESS = 32.0  # of 255, up or down
_FACTORS = (0.5, 1.5)  # of contrast and of saturation
_HUE = 18  # OpenCV's degrees, up or down


@dataclass(frozen=True)
class TrainingViews:
    """A random crop: resized, cut out, mirrored, its colours changed, padded.

    Args:
        crop: side of the square in pixels.
        scale: (long, short) sides in pixels that a picture is fitted into, before the random factor; None: its own
            size.
        ratios: lowest and highest factor.
        most_of_one: of the pixels that count, the part that one class may fill; the crop is drawn again, up to ten
            times, while it fills more.
        flip: also mirrored, every second time.
        photometric: with brightness, contrast, saturation and hue changed.
    """

    crop: int = 512
    scale: tuple[int, int] | None = (2048, 512)
    ratios: tuple[float, float] = (0.5, 2.0)
    most_of_one: float = 0.75
    flip: bool = True
    photometric: bool = True

    def __call__(self, image: ByteArray, places: PlaceArray) -> tuple[Tensor, Tensor]:
        """Normalised pixels (3, crop, crop) float32 and places (crop, crop) int64, padded with 0 and `VOID`."""
        factor = _fit(image.shape[:2], self.scale) * _uniform(*self.ratios)
        size = _scaled(image.shape[:2], factor)
        places = _resized(places, size, cv2.INTER_NEAREST_EXACT)
        top, left = self._corner(places)
        rows, cols = slice(top, top + self.crop), slice(left, left + self.crop)
        # Resized whole and then cut: a cut that is then resized would have other edges.
        image, places = _resized(image, size, cv2.INTER_LINEAR)[rows, cols], places[rows, cols]
        if self.flip and _uniform(0, 1) < 0.5:
            image, places = image[:, ::-1], places[:, ::-1]
        if self.photometric:
            image = distorted(image)
        missing = [(0, self.crop - side) for side in places.shape]
        padded = np.pad(places.astype(np.int64), missing, constant_values=VOID)
        pixels = torch.nn.functional.pad(normalised(image), (0, missing[1][1], 0, missing[0][1]))
        return pixels, torch.from_numpy(padded)

    def _corner(self, places: PlaceArray) -> tuple[int, int]:
        """(top, left) of the crop."""
        room = [max(side - self.crop, 0) for side in places.shape]
        for _ in range(_CROPS_TRIED):
            top, left = (int(torch.randint(side + 1, ())) for side in room)
            cut = places[top : top + self.crop, left : left + self.crop]
            counts = np.bincount(cut[cut != VOID])
            if 0 < counts.max(initial=0) < self.most_of_one * counts.sum():
                break
        return top, left


@dataclass(frozen=True)
class TestView:
    """The whole picture, fitted into a size.

    Args:
        scale: (long, short) sides in pixels that it is fitted into; None: its own size.
    """

    scale: tuple[int, int] | None = (2048, 512)

    __test__ = False  # for pytest, which takes it for a test by its name

    def __call__(self, image: ByteArray) -> Tensor:
        """Normalised pixels (3, rows, cols) float32."""
        size = _scaled(image.shape[:2], _fit(image.shape[:2], self.scale))
        return normalised(_resized(image, size, cv2.INTER_LINEAR))


def normalised(image: ByteArray) -> Tensor:
    """With ImageNet's mean and deviation: (3, rows, cols) float32."""
    # Converted first: torch warns of arrays that are not to be written to, as Pillow's are.
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32)).permute(2, 0, 1).contiguous()
    mean, std = (255 * torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.sub_(mean).div_(std)


def distorted(image: ByteArray) -> ByteArray:
    """Brightness, contrast, saturation and hue changed at random, each of them half of the time."""
    contrast_first = _uniform(0, 1) < 0.5
    if _drawn():
        image = _clipped(image.astype(np.float32) + _uniform(-_BRIGHTNESS, _BRIGHTNESS))
    if contrast_first:
        image = _contrasted(image)
    saturate, turn = _drawn(), _drawn()
    if saturate or turn:
        hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
        if saturate:
            hsv[..., 1] = _clipped(hsv[..., 1] * np.float32(_uniform(*_FACTORS)))
        if turn:
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + int(torch.randint(-_HUE, _HUE + 1, ()))) % _HUES
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    return image if contrast_first else _contrasted(image)


def _contrasted(image: ByteArray) -> ByteArray:
    return _clipped(image * np.float32(_uniform(*_FACTORS))) if _drawn() else image


def _clipped(values: NDArray[Any]) -> ByteArray:
    return values.clip(0, 255).astype(np.uint8)


def _drawn() -> bool:
    return _uniform(0, 1) < _DISTORTED


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _fit(size: tuple[int, ...], scale: tuple[int, int] | None) -> float:
    """The factor by which (rows, cols) come to fit into (long, short)."""
    return min(max(scale) / max(size), min(scale) / min(size)) if scale else 1.0


def _scaled(size: tuple[int, ...], factor: float) -> tuple[int, int]:
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def _resized(pixels: NDArray[Any], size: tuple[int, int], method: int) -> Any:
    """To (rows, cols). Linear also where it shrinks, as published networks were trained and measured."""
    if pixels.shape[:2] == size:
        return pixels
    return cv2.resize(pixels, (size[1], size[0]), interpolation=method)
