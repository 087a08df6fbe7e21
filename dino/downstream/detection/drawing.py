"""Boxes, masks, names and scores over a picture. Knows numpy, OpenCV and Pillow, not torch.

draw = ObjectsOverlay()
drawn = draw(picture, boxes, labels, names, scores, masks)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dino.attention.sheet import font
from dino.downstream.class_colors import Color, class_color

ByteArray: TypeAlias = NDArray[np.uint8]
BoolArray: TypeAlias = NDArray[np.bool_]

# Of the picture's size, the square root of its pixels.
_TEXT_PART, _LINE_PART = 1 / 45, 1 / 350
_SMALLEST_TEXT = 11  # pixels


@dataclass(frozen=True)
class ObjectsOverlay:
    """Called with a picture (rows, cols, 3) uint8 RGB and its objects, the most certain first; returns a new one.

    Args:
        opacity: of the masks, in [0, 1].
        line_width: of boxes, in pixels; None takes it from the picture's size.
        text_size: height of the letters in pixels; None takes it from the picture's size, 0 writes none.
    """

    opacity: float = 0.45
    line_width: int | None = None
    text_size: int | None = None

    def __call__(
        self,
        picture: ByteArray,
        boxes: NDArray[np.floating],
        labels: Sequence[int],
        names: Sequence[str],
        scores: Sequence[float],
        masks: Iterable[BoolArray] = (),
    ) -> ByteArray:
        """`boxes` (N, 4) x0, y0, x1, y1 in pixels; `names` by object; `masks` (rows, cols), one at a time, or none."""
        drawn = np.array(picture, np.uint8)
        size = math.sqrt(picture.shape[0] * picture.shape[1])
        width = max(1, round(size * _LINE_PART)) if self.line_width is None else self.line_width
        colors = [class_color(label) for label in labels]
        for mask, color in zip(masks, colors, strict=False):
            _tint(drawn, mask, color, self.opacity)
        # The most certain on top.
        for box, color in reversed(list(zip(boxes, colors, strict=True))):
            (x0, y0), (x1, y1) = np.round(np.reshape(box, (2, 2))).astype(int).tolist()
            cv2.rectangle(drawn, (x0, y0), (x1 - 1, y1 - 1), color, width)
        text = max(_SMALLEST_TEXT, round(size * _TEXT_PART)) if self.text_size is None else self.text_size
        if not text or not len(boxes):
            return drawn
        captions = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
        return _captioned(drawn, boxes, captions, colors, text)


def _tint(drawn: ByteArray, mask: BoolArray, color: Color, opacity: float) -> None:
    """Only where the mask is, since a picture may be large and its objects many."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    part = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    inside = mask[part]
    pixels = drawn[part][inside]
    drawn[part][inside] = np.round(pixels * (1 - opacity) + np.array(color) * opacity).astype(np.uint8)


def _captioned(
    drawn: ByteArray,
    boxes: NDArray[np.floating],
    captions: Sequence[str],
    colors: Sequence[Color],
    text_size: int,
) -> ByteArray:
    """A plate of the class's colour over each box's corner, with what it says in black or white."""
    image = Image.fromarray(drawn)
    pen = ImageDraw.Draw(image)
    letters = font(text_size)
    margin = max(1, text_size // 6)
    for box, caption, color in reversed(list(zip(boxes, captions, colors, strict=True))):
        written = _writable(caption)
        across, down = (int(side) + 2 * margin for side in pen.textbbox((0, 0), written, letters)[2:])
        # Inside the picture, above the box where there is room.
        x = int(min(max(box[0], 0), max(image.width - across, 0)))
        y = int(box[1]) - down if box[1] >= down else int(min(max(box[1], 0), max(image.height - down, 0)))
        pen.rectangle((x, y, x + across - 1, y + down - 1), fill=color)
        pen.text((x + margin, y + margin), written, fill=_readable_on(color), font=letters)
    return np.array(image)


def _writable(caption: str) -> str:
    """Without line breaks and halves of characters, which cannot be drawn; others the font shows as it can."""
    return "".join(letter if letter.isprintable() else "?" for letter in caption)


def _readable_on(color: Color) -> Color:
    """Black or white, whichever contrasts more by the Web Content Accessibility Guidelines."""
    red, green, blue = (_linear(value / 255) for value in color)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    against_black, against_white = (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)
    return (0, 0, 0) if against_black > against_white else (255, 255, 255)


def _linear(value: float) -> float:
    """Light of a colour's value in [0, 1] (sRGB)."""
    return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4
