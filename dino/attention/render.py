"""From attention weights to pixels: scale, enlarge, colour, mask, save. What is drawn over a picture: `marks`.

Images are (rows, cols, 3) uint8 RGB, maps (rows, cols) float, masks (rows, cols) bool. A map holds one value
per patch; the patches start at the image's top left corner, and the last row and column of them hang over its
edge when its sides are not multiples of the patch size. Nothing here paints on its input.
"""

import difflib
import io
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino.runtime.files import write_atomically
from dino.runtime.options import UserError

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]
BoolArray = NDArray[np.bool_]

# Below this part of its level, a map's contrast is the rounding of float32, not attention.
_ROUNDING = 1e-6

# zlib's fastest: maps have large even areas, so slower levels gain little and cost most of a picture's time.
_PNG_COMPRESSION = 1


def percentile_limits(maps: NDArray[Any], percentiles: tuple[float, float] = (0.0, 100.0)) -> FloatArray:
    """The values to show as black and as white: (2, ..., 1, 1) for maps (..., rows, cols), one pair per map.

    Args:
        percentiles: low and high, in [0, 100]; 0 and 100 are the map's own minimum and maximum. A lower high
            keeps a few outlier patches from darkening everything else. Where these few are all that a map has
            beside an even ground, the limits are its minimum and maximum.
    """
    return _limits(_finite(maps), percentiles)


def normalize(
    maps: NDArray[Any],
    *,
    percentiles: tuple[float, float] = (0.0, 100.0),
    limits: tuple[float, float] | FloatArray | None = None,
) -> FloatArray:
    """Maps (..., rows, cols) on a scale of [0, 1]; values beyond the limits are clipped.

    A map without contrast (all zero, or constant up to rounding) becomes 0 everywhere; values that are not
    finite count as 0.

    Args:
        percentiles: limits of each map by its own values; see `percentile_limits`.
        limits: fixed limits instead, (low, high): for several pictures or a clip on one scale.
    """
    values = _finite(maps)
    low, high = np.asarray(_limits(values, percentiles) if limits is None else limits, np.float64)
    scaled = values - low
    scaled /= np.where(_are_equal(low, high), np.inf, high - low)
    return np.clip(scaled, 0.0, 1.0).astype(np.float32)


def enlarge(
    values: NDArray[Any], patch_size: int, size: tuple[int, int], *, smooth: bool = False
) -> FloatArray:
    """A map (rows, cols) at the size of its image: every patch over exactly the pixels that it was made of.

    Args:
        patch_size: side of a patch in pixels.
        size: (rows, cols) of the image in pixels; what the last patches hold beyond it is cut off.
        smooth: interpolate between the centres of patches (cubic, within the map's own range) instead of
            showing each patch as a square of one value.

    Raises:
        ValueError: the map does not have one value per patch of such an image.
    """
    return np.asarray(_enlarge(np.asarray(values, np.float32), patch_size, size, smooth), np.float32)


def heat(values: FloatArray, colormap: str = "inferno") -> ByteArray:
    """Values (rows, cols) in [0, 1] in the colours of a colormap of matplotlib: (rows, cols, 3) uint8 RGB.

    Raises:
        UserError: matplotlib has no such colormap.
    """
    return np.asarray(cv2.applyColorMap(_levels(values), palette(colormap)[:, None]), np.uint8)


def heat_patches(
    values_RC: NDArray[Any],
    patch_size: int,
    size: tuple[int, int],
    *,
    colormap: str = "inferno",
    smooth: bool = False,
) -> ByteArray:
    """A map in the colours of a colormap at the size of its image: (rows, cols, 3) uint8 RGB.

    The pixels are those of `heat(enlarge(...))`, but patches are coloured before they are enlarged; where
    `smooth`, their 256 levels are enlarged, which may shift a pixel by one or two levels.

    Args:
        values_RC: in [0, 1], one per patch.
        patch_size, size, smooth: as in `enlarge`.

    Raises:
        UserError: matplotlib has no such colormap.
        ValueError: the map does not have one value per patch of such an image.
    """
    levels = _levels(values_RC)
    table = palette(colormap)[:, None]
    if smooth:
        return np.asarray(cv2.applyColorMap(enlarge_colors(levels, patch_size, size, smooth=True), table))
    return enlarge_colors(np.asarray(cv2.applyColorMap(levels, table)), patch_size, size)


def enlarge_colors(
    values: ByteArray, patch_size: int, size: tuple[int, int], *, smooth: bool = False
) -> ByteArray:
    """Colours of patches (R, C, 3), or one byte of each (R, C), at the size of their image: uint8.

    Args:
        patch_size, size, smooth: as in `enlarge`.

    Raises:
        ValueError: there is not one of them per patch of such an image.
    """
    return _enlarge(np.asarray(values, np.uint8), patch_size, size, smooth)


def check_grid(shape: tuple[int, ...], patch_size: int, size: tuple[int, int]) -> None:
    """Refuse a map whose (R, C) is not the grid of patches of an image of (rows, cols) pixels.

    Raises:
        ValueError: it is another.
    """
    grid = tuple(-(-side // patch_size) for side in size)
    if shape[:2] != grid:
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels has {grid[0]} x {grid[1]} patches of {patch_size}, "
            f"got a map of {' x '.join(map(str, shape[:2]))}"
        )


def _enlarge(values: NDArray[Any], patch_size: int, size: tuple[int, int], smooth: bool) -> NDArray[Any]:
    check_grid(values.shape, patch_size, size)
    values = np.ascontiguousarray(values)
    if patch_size == 1:
        return values.copy()
    if smooth:
        rows, cols = values.shape[0] * patch_size, values.shape[1] * patch_size
        large = cv2.resize(values, (cols, rows), interpolation=cv2.INTER_CUBIC)[: size[0], : size[1]]
        # Cubic curves overshoot next to an edge; a map must not gain values that no patch has.
        return np.clip(large, values.min(axis=(0, 1)), values.max(axis=(0, 1)))
    # Columns first: rows are then copied whole. OpenCV's nearest rounds, and may miss a patch's first pixel.
    return values.repeat(patch_size, axis=1)[:, : size[1]].repeat(patch_size, axis=0)[: size[0]]


def _levels(values: NDArray[Any]) -> ByteArray:
    unit = np.clip(np.nan_to_num(np.asarray(values, np.float32)), 0, 1)
    return np.minimum(unit * 256, 255).astype(np.uint8)


@lru_cache
def palette(colormap: str) -> ByteArray:
    """256 colours of one of matplotlib's colormaps: (256, 3) uint8 RGB, not to be written to.

    Raises:
        UserError: matplotlib has no such colormap.
    """
    import matplotlib  # takes half a second, and not all who draw ask for colours

    if colormap not in matplotlib.colormaps:
        nearest = difflib.get_close_matches(colormap, matplotlib.colormaps, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "try inferno, magma, viridis or turbo"
        raise UserError(f"matplotlib has no colormap '{colormap}'; {hint}")
    colours = matplotlib.colormaps[colormap](np.linspace(0, 1, 256), bytes=True)
    table = np.ascontiguousarray(np.asarray(colours, np.uint8)[:, :3])
    table.flags.writeable = False
    return table


def mass_mask(maps: NDArray[Any], keep: float) -> BoolArray:
    """The smallest set of patches that holds at least `keep` of a map's mass: bool (..., rows, cols).

    Of patches with equal weight, those nearer to the top, then to the left, come first. A map without mass
    keeps nothing.

    Args:
        maps: weights (..., rows, cols), not negative; values that are not finite count as 0.
        keep: part of the mass, in [0, 1].
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"the part of the mass to keep is between 0 and 1, got {keep}")
    weights = _finite(maps)
    flat = weights.reshape(-1, math.prod(weights.shape[-2:]))
    falling = np.sort(flat, axis=-1)[:, ::-1]
    mass = np.cumsum(falling, axis=-1, dtype=np.float64)
    # A sum that misses its goal by rounding alone has reached it: a tenth of ten equal patches is one patch.
    goal = keep * mass[:, -1:] * (1 - 1e-9)
    count = (mass < goal).sum(axis=-1, keepdims=True) + (goal > 0)
    least = np.take_along_axis(falling, np.maximum(count - 1, 0), axis=-1)
    kept = flat >= least
    surplus = kept.sum(axis=-1) - count[:, 0]
    for row in np.flatnonzero(surplus):
        kept[row, np.flatnonzero(flat[row] == least[row])[-surplus[row] :]] = False
    return kept.reshape(weights.shape)


def save_png(image: ByteArray, path: Path) -> None:
    """Write (rows, cols, 3) uint8 RGB, or 4 for RGBA, as PNG; under its final name the file is whole or not there.

    Raises:
        UserError: the file cannot be written.
    """
    _save(Image.fromarray(image), path)


def save_heat_png(
    values_RC: NDArray[Any],
    patch_size: int,
    size: tuple[int, int],
    path: Path,
    *,
    colormap: str = "inferno",
    smooth: bool = False,
) -> None:
    """Write what `heat_patches` draws as PNG with a palette: the same colours, several times faster.

    Raises:
        UserError: matplotlib has no such colormap; the file cannot be written.
        ValueError: the map does not have one value per patch of such an image.
    """
    image = Image.fromarray(enlarge_colors(_levels(values_RC), patch_size, size, smooth=smooth))
    image.putpalette(palette(colormap).tobytes())
    _save(image, path)


def _save(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=_PNG_COMPRESSION)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def _limits(values: FloatArray, percentiles: tuple[float, float]) -> FloatArray:
    axes = (-2, -1)
    extremes = np.stack([values.min(axis=axes, keepdims=True), values.max(axis=axes, keepdims=True)])
    if tuple(percentiles) == (0, 100):  # several times faster, and the same
        return extremes
    limits = np.percentile(values, percentiles, axis=axes, keepdims=True).astype(np.float32)
    return np.where(_are_equal(*limits), extremes, limits)


def _are_equal(low: NDArray[Any], high: NDArray[Any]) -> BoolArray:
    return np.asarray(high - low <= _ROUNDING * np.maximum(np.abs(low), np.abs(high)))


def _finite(maps: NDArray[Any]) -> FloatArray:
    return np.nan_to_num(np.asarray(maps, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
