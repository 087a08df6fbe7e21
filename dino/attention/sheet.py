"""Labelled sheets: of pictures with the mean of their heads and every head, or of panels that are drawn already."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dino.attention.marks import AttentionOverlay
from dino.attention.render import ByteArray, enlarge, normalize

_PAPER = (255, 255, 255)
_INK = (34, 34, 34)

# Of a title that is wider than the panels, in text sizes; the name of a file may have 255 letters.
_TITLE_WIDTH = 60


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
    ) -> ByteArray:
        """The sheet, (rows, cols, 3) uint8 RGB on white.

        Args:
            images: each (rows, cols, 3) uint8 RGB; sizes may differ.
            maps: for each image (heads, rows, cols), one value per patch, as `enlarge` takes them.
            patch_size: side of a patch in pixels.
            title: one line above everything.
        """
        if not images or len(images) != len(maps):
            raise ValueError(f"one stack of maps per picture, got {len(maps)} for {len(images)} pictures")
        bands: list[list[Panel]] = []
        for image, heads in zip(images, maps, strict=True):
            bands += _broken(list(self._panels(image, heads, patch_size)), self.columns)
        if not self.columns:
            bands = [bands[0], *([Panel(panel.pixels) for panel in band] for band in bands[1:])]
        return _lay_out(bands, title, _text_size(self.tile))

    def _panels(self, image: ByteArray, maps: NDArray[Any], patch_size: int) -> "Iterator[Panel]":
        labels = ["mean", *(f"head {head}" for head in range(len(maps)))]
        maps = np.concatenate([maps.mean(axis=0, keepdims=True), maps])
        draw = AttentionOverlay(self.colormap, self.opacity)
        size = _fit(image.shape[:2], self.tile)
        picture = _resize(image, size, cv2.INTER_CUBIC)
        yield Panel(picture, "picture")
        for label, values in zip(labels, normalize(maps, percentiles=self.percentiles), strict=True):
            large = enlarge(values, patch_size, image.shape[:2], smooth=self.smooth)
            between = cv2.INTER_LINEAR if self.smooth else cv2.INTER_NEAREST
            yield Panel(draw(picture, _resize(large, size, between), patch_size=1), label)


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet.

    Args:
        pixels: (rows, cols, 3) uint8 RGB.
        label: stands above it.
        color: RGB of a spot beside the label, which makes the sheet a legend; None: no spot.
        patches: whether it shows squares, which keep their edges when it is enlarged.
    """

    pixels: ByteArray
    label: str = ""
    color: tuple[int, int, int] | None = None
    patches: bool = False


def panel_sheet(panels: Iterable[Panel], *, title: str = "", tile: int = 288, columns: int = 5) -> ByteArray:
    """A sheet of panels as they are, (rows, cols, 3) uint8 RGB on white; of large ones one is held at a time.

    Args:
        panels: at least one.
        title: one line above everything.
        tile: longest side of a panel on the sheet, in pixels.
        columns: panels in a row at most, evenly broken.
    """
    fitted = [
        replace(
            panel,
            pixels=_resize(
                panel.pixels,
                _fit(panel.pixels.shape[:2], tile),
                cv2.INTER_NEAREST if panel.patches else cv2.INTER_CUBIC,
            ),
        )
        for panel in panels
    ]
    return _lay_out(_broken(fitted, columns), title, _text_size(tile))


def _broken(panels: list[Panel], columns: int) -> list[list[Panel]]:
    """In rows of at most so many (0: in one), as even as can be."""
    rows = math.ceil(len(panels) / (columns or len(panels)))
    width = math.ceil(len(panels) / rows)
    return [panels[start : start + width] for start in range(0, len(panels), width)]


def _text_size(tile: int) -> int:
    return min(max(12, tile // 13), 18)


def _fit(size: tuple[int, ...], longest: int) -> tuple[int, int]:
    """(rows, cols) of the same shape with the longest side given."""
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resize(pixels: NDArray[Any], size: tuple[int, int], upwards: int) -> Any:
    """To (rows, cols): by area when that shrinks, else by the interpolation given."""
    method = cv2.INTER_AREA if size[0] <= pixels.shape[0] else upwards
    return cv2.resize(pixels, (size[1], size[0]), interpolation=method)


def _lay_out(bands: list[list[Panel]], title: str, text_size: int) -> ByteArray:
    """Panels in columns of one width, their labels above, a title above everything."""
    gap, margin = max(2, text_size // 2), 2 * text_size
    label_height = math.ceil(1.6 * text_size)
    title_height = 3 * text_size if title else 0
    title_font = font(round(1.35 * text_size))
    widths = [max(panel.pixels.shape[1] for panel in column) for column in _columns(bands)]
    heights = [
        max(panel.pixels.shape[0] + label_height * bool(panel.label) for panel in band) for band in bands
    ]
    panels_width = sum(widths) + gap * (len(widths) - 1)
    title = _shortened(title, title_font, max(panels_width, _TITLE_WIDTH * text_size))
    inner_width = max(panels_width, math.ceil(title_font.getlength(title)))
    inner_height = title_height + sum(heights) + gap * (len(heights) - 1)

    sheet = Image.new("RGB", (inner_width + 2 * margin, inner_height + 2 * margin), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), title, fill=_INK, font=title_font)
    top = margin + title_height
    for band, height in zip(bands, heights, strict=True):
        left = margin
        for panel, width in zip(band, widths, strict=False):
            _write_label(pen, panel, (left + width / 2, top + 0.6 * text_size), text_size)
            corner = (left + (width - panel.pixels.shape[1]) // 2, top + label_height * bool(panel.label))
            sheet.paste(Image.fromarray(panel.pixels), corner)
            left += width + gap
        top += height + gap
    return np.asarray(sheet)


def _write_label(pen: ImageDraw.ImageDraw, panel: Panel, centre: tuple[float, float], text_size: int) -> None:
    spot = text_size if panel.color else 0
    x, y = centre
    pen.text((x + 0.6 * spot, y), panel.label, fill=_INK, font=font(text_size), anchor="mm")
    if panel.color:
        left = x - 0.6 * spot - font(text_size).getlength(panel.label) / 2
        box = (left, y - spot / 2, left + spot, y + spot / 2)
        pen.ellipse(box, fill=panel.color, outline=_INK)


def _shortened(text: str, with_font: ImageFont.FreeTypeFont, width: float) -> str:
    """Text that fits into a width in pixels, without its middle where it is too long."""
    kept = len(text)
    short = text
    while kept > 1 and with_font.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return short


def _columns(bands: list[list[Panel]]) -> Iterator[list[Panel]]:
    for index in range(max(map(len, bands))):
        yield [band[index] for band in bands if index < len(band)]


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has the letters of most languages."""
    import matplotlib  # as in `render.palette`

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
