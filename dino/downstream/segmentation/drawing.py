"""What a segmentation looks like: colours over the picture, a legend beside it, and files of class numbers.

    draw = SegmentationOverlay()
    drawn = draw(image, places)                       # new; image is as it was
    drawn = with_legend(drawn, [("road", class_color(3), 0.41), ...])

Pictures are (rows, cols, 3) uint8 RGB, `places` (rows, cols) in [0, K), or `VOID` for pixels that stay as they are.
Knows no torch.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dino.attention.inputs import printable
from dino.attention.sheet import font
from dino.downstream.class_colors import class_color, colors
from dino.downstream.segmentation.classes import VOID, Classes
from dino.runtime.files import write_atomically

ByteArray = NDArray[np.uint8]
Color = tuple[int, int, int]


_SIDE_PER_EDGE = 900  # pixels of a picture's side for each pixel of its lines

_PAPER, _INK = (255, 255, 255), (34, 34, 34)
_LONGEST_NAME = 40  # letters
_MOST_NAMED = 40  # classes in a legend


@dataclass(frozen=True)
class SegmentationOverlay:
    """Each class in its colour over the picture.

    Args:
        opacity: of the colours, in [0, 1]; 1 shows them alone.
        edge: width in pixels of a light line between classes; 0 draws none, None takes it from the picture's size.
    """

    opacity: float = 0.55
    edge: int | None = None

    def __call__(self, image: ByteArray, places: NDArray[Any]) -> ByteArray:
        """The picture with its classes.

        Raises:
            ValueError: there is not one place per pixel.
        """
        if places.shape != image.shape[:2]:
            raise ValueError(f"the picture is {image.shape[:2]}, and the places are {places.shape}")
        picture = np.ascontiguousarray(image)
        inside = (places != VOID).astype(np.uint8)
        tint = np.asarray(colors(int(places.max(initial=0)) + 1)[np.maximum(places, 0)], np.uint8)
        drawn = picture.copy()
        cv2.copyTo(cv2.addWeighted(tint, self.opacity, picture, 1 - self.opacity, 0), inside, drawn)
        edge = max(1, round(math.sqrt(places.size) / _SIDE_PER_EDGE)) if self.edge is None else self.edge
        if edge:
            drawn[_edges(places, edge)] = _PAPER
        return drawn


def _edges(places: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Pixels on whose right or below another class begins, widened."""
    edges = np.zeros(places.shape, np.uint8)
    edges[:, :-1] |= places[:, :-1] != places[:, 1:]
    edges[:-1] |= places[:-1] != places[1:]
    if width > 1:
        edges = np.asarray(cv2.dilate(edges, np.ones((width, width), np.uint8)), np.uint8)
    return edges.astype(bool)


def with_legend(picture: ByteArray, entries: Sequence[tuple[str, Color, float]]) -> ByteArray:
    """The picture with a column of names and colours on its right.

    Args:
        entries: name, colour and part of the picture, in [0, 1], of each class that is there.
    """
    shown = entries[:_MOST_NAMED]
    texts = [f"{_shortened(name)}  {_percent(share)}" for name, _, share in shown]
    if len(entries) > len(shown):
        texts.append(f"and {len(entries) - len(shown)} more")
    rows, cols = picture.shape[:2]
    size = int(np.clip(rows / 24, 12, 40))
    letters = font(size)
    line = round(1.6 * size)
    width = round(3.5 * size + max((letters.getlength(text) for text in texts), default=0))
    page = Image.new("RGB", (cols + width, max(rows, line * (len(texts) + 1))), _PAPER)
    page.paste(Image.fromarray(picture), (0, 0))
    pen = ImageDraw.Draw(page)
    for number, text in enumerate(texts):
        top = line // 2 + number * line
        if number < len(shown):
            corner = (cols + size, top)
            box = (*corner, corner[0] + size, corner[1] + size)
            pen.rectangle(box, fill=shown[number][1], outline=_INK)
        pen.text((cols + 2.5 * size, top + size / 2), text, fill=_INK, font=letters, anchor="lm")
    return np.asarray(page)


def legend_entries(places: NDArray[Any], classes: Classes) -> list[tuple[str, Color, float]]:
    """What `with_legend` takes: the classes that are in a picture, the largest first."""
    counts = np.bincount(places[places != VOID].astype(np.int64), minlength=len(classes))
    order = [place for place in np.argsort(-counts, kind="stable").tolist() if counts[place]]
    return [(classes.names[place], class_color(place), float(counts[place]) / places.size) for place in order]


def save_ids(places: NDArray[Any], classes: Classes, path: Path) -> None:
    """Write the ids of the classes as PNG, under its final name whole or not there.

    With a palette of their colours, where all ids are below 256; else as 16-bit grey.

    Args:
        places: (rows, cols) in [0, K).

    Raises:
        UserError: the file cannot be written.
    """
    ids = classes.ids_of(places)
    if max(classes.ids) < 256:
        palette = np.zeros((256, 3), np.uint8)
        palette[list(classes.ids)] = colors(len(classes))
        image = Image.fromarray(ids.astype(np.uint8))
        image.putpalette(palette.tobytes())
    else:
        image = Image.fromarray(ids)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def _shortened(name: str) -> str:
    line = " ".join(printable(name).split())
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}…"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "<1 %"
