"""A colour for each class of a data set, the same in every picture."""

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

ByteArray = NDArray[np.uint8]
Color = tuple[int, int, int]

_STEPS = 16  # of red, green and blue, in the colours to choose from
_LIGHTNESS = (35.0, 90.0)  # of CIELAB, within which a colour can be told on paper and in the dark
_FIRST = (255, 0, 0)
_DIFFERENT = 256


@lru_cache
def colors(count: int) -> ByteArray:
    """Colours (count, 3) uint8 RGB of the first places, not to be written to; a place has its own however many.

    Each is as far from those before it as can be, in CIELAB; beyond the 256th they begin again.
    """
    order = _order()
    table = order[np.arange(count) % len(order)]
    table.flags.writeable = False
    return table


def class_color(place: int) -> Color:
    """RGB, each in [0, 255]."""
    red, green, blue = colors(place + 1)[place].tolist()
    return red, green, blue


@lru_cache(1)
def _order() -> ByteArray:
    levels = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    every = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = cv2.cvtColor(every[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    seen = (lab[:, 0] >= _LIGHTNESS[0]) & (lab[:, 0] <= _LIGHTNESS[1])
    every, lab = every[seen], lab[seen]
    chosen = [int(np.flatnonzero((every == _FIRST).all(axis=1))[0])]
    distance = np.full(len(every), np.inf)
    for _ in range(_DIFFERENT - 1):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return every[chosen]
