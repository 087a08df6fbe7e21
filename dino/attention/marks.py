"""What is drawn over a picture: heat, masks, contours, one colour per head; and cut-outs.

    draw = AttentionOverlay()
    drawn = draw(image, normalize(maps)[0], patch_size)

Each mark is set up with its look and called with an image, (rows, cols, 3) uint8 RGB, and values of its patches,
(R, C) or for all heads (H, R, C); it returns a new image. With a patch size of 1 the values are the pixels' own.
A map of another grid than the image's is a ValueError.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray
from PIL import ImageColor

from dino.attention.render import (
    BoolArray,
    ByteArray,
    FloatArray,
    check_grid,
    enlarge_colors,
    heat_patches,
    mass_mask,
    palette,
)

# Any two of them are at least 36 apart in CIELAB, where 2 can be told; the first eight as far as can be.
_HEAD_COLORS = (
    *("red", "dodgerblue", "gold", "limegreen", "fuchsia", "aqua", "darkorange", "blueviolet"),
    *(
        "palevioletred",
        "darkolivegreen",
        "white",
        "saddlebrown",
        "khaki",
        "darkcyan",
        "deeppink",
        "rebeccapurple",
    ),
)

# Points per patch that a contour's curve is computed at: odd, so that the patches' centres are among them.
_CURVE = 3

# Of the dark edge that sets a line off from a picture of its colour.
_EDGE_OPACITY = 0.5

# Parts of a pixel, 2 ** -4, that OpenCV is given points in.
_SHIFT = 4


@dataclass(frozen=True)
class AttentionOverlay:
    """Heat over the picture: called with a map (R, C) of values in [0, 1].

    Args:
        colormap: name of one of matplotlib's.
        opacity: of the heat, in [0, 1]; 1 shows the heat alone.
        smooth: interpolate between the centres of patches.

    Raises:
        UserError: matplotlib has no such colormap.
    """

    colormap: str = "inferno"
    opacity: float = 0.6
    smooth: bool = False

    def __post_init__(self) -> None:
        palette(self.colormap)

    def __call__(self, image: ByteArray, values_RC: FloatArray, patch_size: int) -> ByteArray:
        heated = heat_patches(
            values_RC, patch_size, image.shape[:2], colormap=self.colormap, smooth=self.smooth
        )
        return _blend(heated, self.opacity, image)


@dataclass(frozen=True)
class MaskOverlay:
    """A mask as a tint with an outline; what is outside is dimmed. Called with a mask (R, C) bool.

    Args:
        color: RGB, each in [0, 255].
        opacity: of the tint inside, in [0, 1].
        dimming: of what is outside, in [0, 1]; 0 leaves it as it is, 1 makes it black.
        line_width: of the outline, in pixels; 0 draws none, None takes it from the picture's size.
    """

    color: tuple[int, int, int] = (255, 170, 0)
    opacity: float = 0.35
    dimming: float = 0.45
    line_width: int | None = None

    def __call__(self, image: ByteArray, mask_RC: BoolArray, patch_size: int) -> ByteArray:
        tint_RC3 = np.full((*mask_RC.shape, 3), self.color, np.uint8)
        tint = enlarge_colors(tint_RC3, patch_size, image.shape[:2])
        inside = enlarge_colors(mask_RC.astype(np.uint8), patch_size, image.shape[:2])
        drawn = _tint(image, tint, inside, self.opacity, self.dimming)
        width = _line_width(image, self.line_width)
        if width:
            kernel = np.ones((2 * width + 1,) * 2, np.uint8)
            core = cv2.erode(inside, kernel)  # beyond the image's edge counts as inside
            cv2.copyTo(tint, inside - core, drawn)
        return drawn


@dataclass(frozen=True)
class ContourOverlay:
    """Lines around the smallest sets of patches that hold given parts of a map's mass: called with raw weights (R, C).

    A line is where the map, interpolated between the centres of patches, equals the middle between the lightest
    patch of the set and the heaviest one outside: on its inner side lie the centres of just the patches that
    `mass_mask` keeps, though the line between them is curved. A set that ends amid patches of equal weight
    loses these. Weights that are not finite count as 0; a map without mass gets no line.

    Args:
        levels: parts of the mass, in (0, 1).
        colormap: name of one of matplotlib's; smaller sets get higher colours.
        line_width: in pixels; None takes it from the picture's size.

    Raises:
        UserError: matplotlib has no such colormap.
    """

    levels: tuple[float, ...] = (0.25, 0.5, 0.75)
    colormap: str = "plasma"
    line_width: int | None = None

    def __post_init__(self) -> None:
        palette(self.colormap)

    def color(self, level: float) -> tuple[int, int, int]:
        """RGB of the line around the set that holds this part of the mass."""
        red, green, blue = palette(self.colormap)[round(255 * (1 - 0.5 * level))].tolist()
        return red, green, blue

    def __call__(self, image: ByteArray, values_RC: NDArray[Any], patch_size: int) -> ByteArray:
        check_grid(values_RC.shape, patch_size, image.shape[:2])
        drawn = np.array(image, order="C")
        weights_RC = np.nan_to_num(np.asarray(values_RC, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        curves = _Curves(weights_RC, patch_size)
        width = _line_width(image, self.line_width)
        lines = [
            (level, curves.at(value))
            for level in sorted(self.levels, reverse=True)
            if (value := _threshold(weights_RC, level)) is not None
        ]
        # All the dark edges first: where lines run close, they are not to cover one another's colour.
        edged = drawn.copy()
        for _, line in lines:
            cv2.polylines(edged, line, False, (0, 0, 0), width + 2, cv2.LINE_8, _SHIFT)
        drawn = _blend(edged, _EDGE_OPACITY, drawn)
        for level, line in lines:
            cv2.polylines(drawn, line, False, self.color(level), width, cv2.LINE_AA, _SHIFT)
        return drawn


def _threshold(weights_RC: FloatArray, level: float) -> float | None:
    kept_RC = mass_mask(weights_RC, level)
    if not kept_RC.any() or kept_RC.all():
        return None
    heaviest_outside = weights_RC[~kept_RC].max()
    above = weights_RC[weights_RC > heaviest_outside]
    return (float(above.min()) + float(heaviest_outside)) / 2 if above.size else None


class _Curves:
    """Lines of equal value of a map, interpolated between the centres of its patches.

    The outermost patches' values hold up to the edge of the grid and beyond, as in `enlarge`.
    """

    def __init__(self, values_RC: FloatArray, patch_size: int):
        wide = np.pad(values_RC, 1, mode="edge")
        fine = cv2.resize(wide, None, fx=_CURVE, fy=_CURVE, interpolation=cv2.INTER_CUBIC)
        rows, cols = (((np.arange(side) + 0.5) / _CURVE - 1) * patch_size - 0.5 for side in fine.shape)
        self._generator = contour_generator(cols, rows, fine, name="serial")

    def at(self, value: float) -> list[NDArray[np.int32]]:
        """Lines of points (x, y) in parts of a pixel, without those that a quarter of a pixel can do without."""
        lines = (np.round(line * 2**_SHIFT).astype(np.int32) for line in self._generator.lines(value))
        return [_simplified(line) for line in lines]


def _simplified(line: NDArray[np.int32]) -> NDArray[np.int32]:
    closed = bool((line[0] == line[-1]).all())
    fewer = cv2.approxPolyDP(line[:-1] if closed else line, 2**_SHIFT / 4, closed)
    return np.concatenate([fewer, fewer[:1]]) if closed else np.asarray(fewer)


@dataclass(frozen=True)
class HeadColors:
    """One colour per head over the picture, as in the DINO paper's figure 3: called with raw maps (H, R, C).

    A head colours the smallest set of patches that holds `keep` of its mass; where sets overlap, the head colours
    that has the larger share of its own mass there. A head has the colour of its number, whichever others are
    drawn; those beyond the sixteenth start the colours again.

    Args:
        keep: part of a head's mass, in [0, 1].
        opacity: of the colours, in [0, 1].
        dimming: of what no head keeps, in [0, 1]; 0 leaves it as it is, 1 makes it black.
    """

    keep: float = 0.6
    opacity: float = 0.55
    dimming: float = 0.35

    def color(self, head: int) -> tuple[int, int, int]:
        """RGB, each in [0, 255]."""
        red, green, blue = ImageColor.getrgb(_HEAD_COLORS[head % len(_HEAD_COLORS)])[:3]
        return red, green, blue

    def __call__(
        self, image: ByteArray, maps_HRC: NDArray[Any], patch_size: int, numbers: Sequence[int] | None = None
    ) -> ByteArray:
        """`numbers`: those of the heads; None: they are counted from 0."""
        weights_HRC = np.nan_to_num(np.asarray(maps_HRC, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
        kept_HRC = mass_mask(weights_HRC, self.keep)
        mass_H11 = weights_HRC.sum(axis=(1, 2), keepdims=True)
        share_HRC = np.where(kept_HRC, weights_HRC / np.where(mass_H11 > 0, mass_H11, 1), -1.0)
        numbers = range(len(weights_HRC)) if numbers is None else numbers
        colors_H3 = np.array([self.color(head) for head in numbers], np.uint8)
        tint = enlarge_colors(colors_H3[share_HRC.argmax(axis=0)], patch_size, image.shape[:2])
        kept_RC = np.asarray(kept_HRC.any(axis=0), np.uint8)
        inside = enlarge_colors(kept_RC, patch_size, image.shape[:2])
        return _tint(image, tint, inside, self.opacity, self.dimming)


def cut_out(image: ByteArray, mask_RC: BoolArray, patch_size: int) -> ByteArray:
    """What a mask (R, C) keeps, for pasting elsewhere: (rows, cols, 4) uint8 RGBA.

    Alpha is 255 inside the mask and 0 outside, where the colours are still those of the picture.
    """
    alpha_RC = np.where(mask_RC, np.uint8(255), np.uint8(0))
    alpha = enlarge_colors(alpha_RC, patch_size, image.shape[:2])
    cut = np.empty((*image.shape[:2], 4), np.uint8)
    cv2.mixChannels([np.ascontiguousarray(image), alpha], [cut], [0, 0, 1, 1, 2, 2, 3, 3])
    return cut


def _blend(layer: ByteArray, opacity: float, image: ByteArray) -> ByteArray:
    return np.asarray(cv2.addWeighted(layer, opacity, np.ascontiguousarray(image), 1 - opacity, 0), np.uint8)


def _tint(image: ByteArray, tint: ByteArray, inside: ByteArray, opacity: float, dimming: float) -> ByteArray:
    """`tint` over what is inside, the rest dimmed; `inside` (rows, cols) is not 0 there."""
    drawn = cv2.convertScaleAbs(np.ascontiguousarray(image), alpha=1 - dimming)
    cv2.copyTo(_blend(tint, opacity, image), inside, drawn)
    return np.asarray(drawn, np.uint8)


def _line_width(image: ByteArray, width: int | None) -> int:
    """Pixels; on a picture of 720 rows 2, and on others the same part of it."""
    return max(1, round(math.sqrt(image.shape[0] * image.shape[1]) / 450)) if width is None else width
