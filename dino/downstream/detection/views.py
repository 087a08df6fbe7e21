"""Training views for detection: resized to one of several sizes, half of them cut out before, and mirrored.

    view, objects = DetectionViews()(picture, objects)

All draws are from torch's global generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from dino.downstream.detection.coco import Objects

Picture = NDArray[np.uint8]

SHORT_SIDES = tuple(range(480, 801, 32))
LONG_SIDE = 1333
CUT_FROM = (400, 500, 600)
CUT_SIDES = (384, 600)


@dataclass(frozen=True)
class DetectionViews:
    """A picture (H, W, 3) uint8 and its objects to a view and what of them is in it; the arguments stay unchanged.

    Args:
        short_sides: in pixels, of which one is drawn for a view.
        long_side: in pixels, that the other side is kept to.
        cut_share: of the views that are cut out before, in [0, 1].
        cut_from: short sides, of which one is drawn for the picture that is cut.
        cut_sides: shortest and longest side of a cut; a smaller picture is left whole.
        flip_share: of the views that are mirrored, in [0, 1].
    """

    short_sides: Sequence[int] = SHORT_SIDES
    long_side: int = LONG_SIDE
    cut_share: float = 0.5
    cut_from: Sequence[int] = CUT_FROM
    cut_sides: tuple[int, int] = CUT_SIDES
    flip_share: float = 0.5

    def __call__(self, picture: Picture, objects: Objects) -> tuple[Picture, Objects]:
        if _happens(self.flip_share):
            picture, objects = mirrored(picture, objects)
        if _happens(self.cut_share):
            picture, objects = resized(picture, objects, _one_of(self.cut_from), self.long_side)
            rows, cols = (_between(*self.cut_sides, most=side) for side in picture.shape[:2])
            top, left = _up_to(picture.shape[0] - rows), _up_to(picture.shape[1] - cols)
            picture, objects = cut(picture, objects, top, left, rows, cols)
        picture, objects = resized(picture, objects, _one_of(self.short_sides), self.long_side)
        return picture, _that_are_seen(objects)


def resized(picture: Picture, objects: Objects, short_side: int, long_side: int) -> tuple[Picture, Objects]:
    """To a short side in pixels, or to a smaller one that keeps the long side within its limit."""
    height, width = picture.shape[:2]
    scale = min(short_side / min(height, width), long_side / max(height, width))
    size = max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)
    factors = np.array([size[0] / width, size[1] / height] * 2, np.float32)
    masks = np.empty((len(objects.masks), size[1], size[0]), np.uint8)
    for small, mask in zip(masks, objects.masks, strict=True):
        small[...] = _resized_mask(mask, size)
    # Without antialiasing, as published models were trained and measured.
    view = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    return view, Objects(objects.boxes * factors, objects.labels, masks)


def mirrored(picture: Picture, objects: Objects) -> tuple[Picture, Objects]:
    """Left and right exchanged."""
    x0, y0, x1, y1 = objects.boxes.T
    width = np.float32(picture.shape[1])
    boxes = np.stack([width - x1, y0, width - x0, y1], axis=1)
    return (
        np.ascontiguousarray(picture[:, ::-1]),
        Objects(boxes, objects.labels, np.ascontiguousarray(objects.masks[:, :, ::-1])),
    )


def cut(
    picture: Picture, objects: Objects, top: int, left: int, rows: int, cols: int
) -> tuple[Picture, Objects]:
    """A part of the picture; an object is what is seen of it, and none that is not."""
    boxes = objects.boxes - np.array([left, top] * 2, np.float32)
    boxes = boxes.clip(0, np.array([cols, rows] * 2, np.float32))
    masks = objects.masks[:, top : top + rows, left : left + cols]
    part = picture[top : top + rows, left : left + cols]
    return np.ascontiguousarray(part), _that_are_seen(Objects(boxes, objects.labels, masks))


def _that_are_seen(objects: Objects) -> Objects:
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    seen = (sides > 0).all(axis=1) & objects.masks.any(axis=(1, 2))
    return Objects(objects.boxes[seen], objects.labels[seen], objects.masks[seen])


def _resized_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels that are covered by half or more."""
    shrunk = size[0] < mask.shape[1]
    parts = cv2.resize(mask * 255, size, interpolation=cv2.INTER_AREA if shrunk else cv2.INTER_LINEAR)
    return np.asarray(parts >= 128, bool)


def _happens(share: float) -> bool:
    return bool(torch.rand(()) < share)


def _one_of(values: Sequence[int]) -> int:
    return values[_up_to(len(values) - 1)]


def _between(least: int, greatest: int, *, most: int) -> int:
    """A number from `least` to `greatest`, neither of them over `most`."""
    low = min(least, most)
    return low + _up_to(min(greatest, most) - low)


def _up_to(greatest: int) -> int:
    return int(torch.randint(greatest + 1, ()))
