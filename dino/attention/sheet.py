"""A labelled sheet of attention maps: each picture, the mean of its heads, and every head; or maps of one's choice."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dino.attention.marks import AttentionOverlay
from dino.attention.render import ByteArray, enlarge, normalize

_PAPER = (255, 255, 255)
_INK = (34, 34, 34)


@dataclass(frozen=True)
class AttentionSheet:
    """Rows are pictures; columns are the picture and its maps, labelled.

    Args:
        colormap: name of one of matplotlib's.
        opacity: of the heat over the picture, in [0, 1]; 1 shows the heat alone.
        percentiles: low and high, in [0, 100], of the colour scale that every map has for itself; below 100, a
            few outlier patches do not darken everything else.
        smooth: interpolate between patches.
        tile: longest side of a picture on the sheet, in pixels.
        columns: break a picture's row evenly when it has more tiles than this; 0 keeps it in one.

    Raises:
        UserError: matplotlib has no such colormap.
    """

    colormap: str = "inferno"
    opacity: float = 1.0
    percentiles: tuple[float, float] = (0.0, 99.0)
    smooth: bool = False
    tile: int = 192
    columns: int = 0

    def __post_init__(self) -> None:
        AttentionOverlay(self.colormap, self.opacity)

    def __call__(
        self,
        images: Sequence[ByteArray],
        maps: Sequence[NDArray[Any]],
        *,
        patch_size: int,
        title: str = "",
        labels: Sequence[str] | None = None,
    ) -> ByteArray:
        """The sheet, (rows, cols, 3) uint8 RGB on white.

        Args:
            images: each (rows, cols, 3) uint8 RGB; sizes may differ.
            maps: for each image (heads, rows, cols), one value per patch, as `enlarge` takes them.
            patch_size: side of a patch in pixels.
            title: one line above everything.
            labels: what the maps of each picture are, when they are to be drawn as given; None: they are all its
                heads, and their mean is drawn before them.
        """
        if not images or len(images) != len(maps):
            raise ValueError(f"one stack of maps per picture, got {len(maps)} for {len(images)} pictures")
        bands: list[list[_Tile]] = []
        for image, heads in zip(images, maps, strict=True):
            tiles = list(self._tiles(image, heads, patch_size, labels))
            bands_needed = math.ceil(len(tiles) / (self.columns or len(tiles)))
            width = math.ceil(len(tiles) / bands_needed)
            bands.extend(tiles[start : start + width] for start in range(0, len(tiles), width))
        if not self.columns:
            bands = [bands[0], *([_Tile(tile.pixels) for tile in band] for band in bands[1:])]
        return _lay_out(bands, title, text_size=min(max(12, self.tile // 13), 18))

    def _tiles(
        self, image: ByteArray, maps: NDArray[Any], patch_size: int, labels: Sequence[str] | None
    ) -> "Iterator[_Tile]":
        if labels is None:
            labels = ["mean", *(f"head {head}" for head in range(len(maps)))]
            maps = np.concatenate([maps.mean(axis=0, keepdims=True), maps])
        if len(labels) != len(maps):
            raise ValueError(f"one label per map, got {len(labels)} for {len(maps)} maps")
        draw = AttentionOverlay(self.colormap, self.opacity)
        size = _fit(image.shape[:2], self.tile)
        picture = _resize(image, size, cv2.INTER_CUBIC)
        yield _Tile(picture, "picture")
        for label, values in zip(labels, normalize(maps, percentiles=self.percentiles), strict=True):
            large = enlarge(values, patch_size, image.shape[:2], smooth=self.smooth)
            between = cv2.INTER_LINEAR if self.smooth else cv2.INTER_NEAREST
            yield _Tile(draw(picture, _resize(large, size, between), patch_size=1), label)


@dataclass(frozen=True)
class _Tile:
    pixels: ByteArray
    label: str = ""


def _fit(size: tuple[int, ...], longest: int) -> tuple[int, int]:
    """(rows, cols) of the same shape with the longest side given."""
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resize(pixels: NDArray[Any], size: tuple[int, int], upwards: int) -> Any:
    """To (rows, cols): by area when that shrinks, else by the interpolation given."""
    method = cv2.INTER_AREA if size[0] <= pixels.shape[0] else upwards
    return cv2.resize(pixels, (size[1], size[0]), interpolation=method)


def _lay_out(bands: list[list[_Tile]], title: str, text_size: int) -> ByteArray:
    """Tiles in columns of one width, their labels above, a title above everything."""
    gap, margin = max(2, text_size // 2), 2 * text_size
    label_height = math.ceil(1.6 * text_size)
    title_height = 3 * text_size if title else 0
    title_font = font(round(1.35 * text_size))
    widths = [max(tile.pixels.shape[1] for tile in column) for column in _columns(bands)]
    heights = [max(tile.pixels.shape[0] + label_height * bool(tile.label) for tile in band) for band in bands]
    inner_width = max(sum(widths) + gap * (len(widths) - 1), math.ceil(title_font.getlength(title)))
    inner_height = title_height + sum(heights) + gap * (len(heights) - 1)

    sheet = Image.new("RGB", (inner_width + 2 * margin, inner_height + 2 * margin), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), title, fill=_INK, font=title_font)
    top = margin + title_height
    for band, height in zip(bands, heights, strict=True):
        left = margin
        for tile, width in zip(band, widths, strict=False):
            centre = (left + width / 2, top + 0.6 * text_size)
            pen.text(centre, tile.label, fill=_INK, font=font(text_size), anchor="mm")
            corner = (left + (width - tile.pixels.shape[1]) // 2, top + label_height * bool(tile.label))
            sheet.paste(Image.fromarray(tile.pixels), corner)
            left += width + gap
        top += height + gap
    return np.asarray(sheet)


def _columns(bands: list[list[_Tile]]) -> Iterator[list[_Tile]]:
    for index in range(max(map(len, bands))):
        yield [band[index] for band in bands if index < len(band)]


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has the letters of most languages."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
