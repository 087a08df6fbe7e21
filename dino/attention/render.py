"""From attention weights to pixels: scale, enlarge, colour, blend, mask, save.

Images are (rows, cols, 3) uint8 RGB, maps (rows, cols) float, masks (rows, cols) bool. A map holds one value
per patch; the patches start at the image's top left corner, and the last row and column of them hang over its
edge when its sides are not multiples of the patch size. Nothing here paints on its input.
"""

import difflib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
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
            keeps a few outlier patches from darkening everything else.
    """
    return np.percentile(_finite(maps), percentiles, axis=(-2, -1), keepdims=True).astype(np.float32)


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
    low, high = np.asarray(percentile_limits(values, percentiles) if limits is None else limits, np.float64)
    contrast = high - low
    flat = contrast <= _ROUNDING * np.maximum(np.abs(low), np.abs(high))
    scaled = (values - low) / np.where(flat, 1.0, contrast)
    return np.where(flat, 0.0, np.clip(scaled, 0.0, 1.0)).astype(np.float32)


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
    grid = tuple(-(-side // patch_size) for side in size)
    if values.shape != grid:
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels has {grid[0]} x {grid[1]} patches of {patch_size}, "
            f"got a map of {' x '.join(map(str, values.shape))}"
        )
    values = np.asarray(values, np.float32)
    rows, cols = grid[0] * patch_size, grid[1] * patch_size
    if smooth:
        large = cv2.resize(values, (cols, rows), interpolation=cv2.INTER_CUBIC)
        # Cubic curves overshoot next to an edge; a map must not gain values that no patch has.
        large = np.clip(large, values.min(), values.max())
    else:
        large = values.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    return np.ascontiguousarray(large[: size[0], : size[1]])


def heat(values: FloatArray, colormap: str = "inferno") -> ByteArray:
    """Values (rows, cols) in [0, 1] in the colours of a colormap of matplotlib: (rows, cols, 3) uint8 RGB.

    Raises:
        UserError: matplotlib has no such colormap.
    """
    levels = np.clip(np.asarray(values, np.float32) * 256, 0, 255).astype(np.uint8)
    return np.asarray(cv2.applyColorMap(levels, _colours(colormap)), np.uint8)


@lru_cache
def _colours(colormap: str) -> ByteArray:
    """256 RGB colours in OpenCV's shape of a look-up table."""
    if colormap not in matplotlib.colormaps:
        nearest = difflib.get_close_matches(colormap, matplotlib.colormaps, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "try inferno, magma, viridis or turbo"
        raise UserError(f"matplotlib has no colormap '{colormap}'; {hint}")
    colours = matplotlib.colormaps[colormap](np.linspace(0, 1, 256), bytes=True)
    return np.ascontiguousarray(np.asarray(colours, np.uint8)[:, None, :3])


@dataclass(frozen=True)
class AttentionOverlay:
    """Heat over the picture.

    Args:
        colormap: name of one of matplotlib's.
        opacity: of the heat, in [0, 1]; 1 shows the heat alone.

    Raises:
        UserError: matplotlib has no such colormap.
    """

    colormap: str = "inferno"
    opacity: float = 0.6

    def __post_init__(self) -> None:
        _colours(self.colormap)

    def __call__(self, image: ByteArray, values: FloatArray) -> ByteArray:
        """A new image: the colours of `values` (rows, cols) in [0, 1] over `image` of the same size."""
        _check_same_size(image, values)
        heated = heat(values, self.colormap)
        return np.asarray(cv2.addWeighted(heated, self.opacity, image, 1 - self.opacity, 0), np.uint8)


@dataclass(frozen=True)
class MaskOverlay:
    """A mask as a tint with an outline; what is outside is dimmed.

    Args:
        color: RGB, each in [0, 255].
        opacity: of the tint inside, in [0, 1].
        dimming: of what is outside, in [0, 1]; 0 leaves it as it is, 1 makes it black.
        line_width: of the outline, in pixels; 0 draws none.
    """

    color: tuple[int, int, int] = (255, 170, 0)
    opacity: float = 0.35
    dimming: float = 0.45
    line_width: int = 2

    def __call__(self, image: ByteArray, mask: BoolArray) -> ByteArray:
        """A new image: `mask` (rows, cols), true where it keeps the picture, over `image` of that size."""
        _check_same_size(image, mask)
        tint = np.full_like(image, self.color)
        inside = cv2.addWeighted(tint, self.opacity, image, 1 - self.opacity, 0)
        outside = cv2.convertScaleAbs(image, alpha=1 - self.dimming)
        drawn = np.where(mask[..., None], inside, outside)
        if self.line_width:
            kernel = np.ones((2 * self.line_width + 1,) * 2, np.uint8)
            core = cv2.erode(mask.astype(np.uint8), kernel)  # beyond the image's edge counts as inside
            drawn[mask & (core == 0)] = self.color
        return drawn


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
    weights = _finite(maps).astype(np.float64)
    flat = weights.reshape(*weights.shape[:-2], -1)
    order = np.argsort(-flat, axis=-1, kind="stable")
    mass = np.cumsum(np.take_along_axis(flat, order, axis=-1), axis=-1)
    # A sum that misses its goal by rounding alone has reached it: a tenth of ten equal patches is one patch.
    goal = keep * mass[..., -1:] * (1 - 1e-9)
    before = np.concatenate([np.zeros_like(goal), mass[..., :-1]], axis=-1)
    kept = np.zeros(flat.shape, bool)
    np.put_along_axis(kept, order, before < goal, axis=-1)
    return kept.reshape(weights.shape)


def save_png(image: ByteArray, path: Path) -> None:
    """Write (rows, cols, 3) uint8 RGB as PNG; under its final name the file is whole or not there.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=_PNG_COMPRESSION)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def _finite(maps: NDArray[Any]) -> FloatArray:
    return np.nan_to_num(np.asarray(maps, np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _check_same_size(image: ByteArray, layer: NDArray[Any]) -> None:
    if image.shape[:2] != layer.shape:
        raise ValueError(
            f"the image has {image.shape[0]} x {image.shape[1]} pixels, what is drawn over it "
            f"{' x '.join(map(str, layer.shape))}; see `enlarge`"
        )
