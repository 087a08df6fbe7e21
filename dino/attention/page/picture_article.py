"""A picture of the gallery as html: its preview, and the weights of its heads for the page's script.

H heads, R and C rows and columns of patches.
"""

import base64
import io
import json
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from dino.attention.page import escape
from dino.attention.render import ByteArray, FloatArray, check_grid

_LONGEST_SIDE = 960
_QUALITY = 82

# What a browser still decodes and redraws at once; beyond it, patches are averaged for the page.
_MOST_PATCHES = 40_000


def picture_article(
    name: str, image: ByteArray, maps: FloatArray, patch_size: int, on: Sequence[int] = ()
) -> str:
    """The beginning of an `article`, which its caller ends.

    Args:
        name: its heading.
        image: (rows, cols, 3) uint8 RGB.
        maps: raw weights (H, R, C), one per patch, not negative; what is not finite counts as 0.
        patch_size: side of a patch in pixels.
        on: heads that are switched on at first; empty: all.

    Raises:
        ValueError: the maps do not have one value per patch of the image.
    """
    rows, cols = image.shape[:2]
    if maps.ndim != 3 or not len(maps):
        raise ValueError(f"maps are (heads, rows, cols), of one head at least, got {maps.shape}")
    check_grid(maps.shape[1:], patch_size, (rows, cols))
    weights = np.maximum(np.nan_to_num(np.asarray(maps, np.float32), nan=0, posinf=0, neginf=0), 0)
    side = _block_side(maps.shape[1:])
    facts = (
        f"{cols} &times; {rows} pixels · {maps.shape[2]} &times; {maps.shape[1]} patches of {patch_size} · "
        f"{len(maps)} {'head' if len(maps) == 1 else 'heads'}"
    )
    hint = (
        f'<p class="soft">For this page, weights are averaged over blocks of {side} &times; {side} patches; '
        "the full-size files have every patch.</p>"
        if side > 1
        else ""
    )
    return (
        f'<article class="card picture" data-heads="{len(maps)}" '
        f'data-on="{",".join(map(str, on or range(len(maps))))}">'
        f'<header><h2>{escape(name)}</h2><p class="soft">{facts}</p></header>'
        f'<div class="place">{_preview(image, name)}</div>{hint}'
        f'<script type="application/json" class="maps">{_stored(weights, side, patch_size, (rows, cols))}</script>'
    )


def _block_side(grid: tuple[int, ...]) -> int:
    """Of the blocks of patches to average, the smallest that leaves few enough of them."""
    side = 1
    while -(-grid[0] // side) * -(-grid[1] // side) > _MOST_PATCHES:
        side += 1
    return side


def _averaged(maps: FloatArray, side: int) -> FloatArray:
    """Means over blocks of side x side patches; those at the lower and right edge may hold fewer."""
    if side == 1:
        return maps
    sums = np.asarray(maps, np.float64)
    for axis in (1, 2):
        sums = np.add.reduceat(sums, np.arange(0, maps.shape[axis], side), axis=axis)
    counts = [np.diff(np.append(np.arange(0, count, side), count)) for count in maps.shape[1:]]
    return (sums / np.multiply.outer(*counts)).astype(np.float32)


def _stored(weights: FloatArray, side: int, patch_size: int, size: tuple[int, int]) -> str:
    """JSON: the averages of each head as uint16 relative to its maximum, little-endian, in base64."""
    maps = _averaged(weights, side)
    tops = maps.max(axis=(1, 2)).astype(np.float64)
    levels = np.rint(maps / np.where(tops > 0, tops, 1)[:, None, None] * 65535).astype("<u2")
    return json.dumps(
        {
            "rows": maps.shape[1],
            "cols": maps.shape[2],
            "patch": patch_size * side,
            "patches": weights[0].size,
            "height": size[0],
            "width": size[1],
            "tops": tops.tolist(),
            "heads": [in_base64(head.tobytes()) for head in levels],
        }
    )


def _preview(image: ByteArray, name: str) -> str:
    rows, cols = image.shape[:2]
    scale = min(1.0, _LONGEST_SIDE / max(rows, cols))
    size = max(1, round(cols * scale)), max(1, round(rows * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(small, np.uint8)).save(buffer, format="JPEG", quality=_QUALITY)
    return (
        f'<img src="data:image/jpeg;base64,{in_base64(buffer.getvalue())}" width="{size[0]}" height="{size[1]}" '
        f'alt="{escape(name)}" decoding="async">'
    )


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
