"""Which classes are taken for which: the confusion matrix as numbers (CSV) and as a picture (PNG).

L = classes; rows are the true classes, columns the predicted ones
"""

import csv
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dino.attention.render import ByteArray, save_png
from dino.runtime.files import write_atomically

_INK = "#222222"
_FAINT = "#7a7a7a"
_EMPTY = "#e2e2e2"  # rows of classes without pictures
_COLORMAP = "Blues"
_FONT = 8  # points
_DPI = 110

# Errors are a few percent of a row, the diagonal most of it: a root of the share shows both.
_ROOT = 0.4
_DARK = 30  # percent; the number in a darker cell is white

_MOST_NAMED = 30  # classes whose names and numbers can be read
_NAME_HEAD, _NAME_TAIL = 14, 5  # letters that are kept of a long name

# In pixels.
_NAMED_SIDE, _NAMED_CELL = 560, (32, 90)
_PLAIN_SIDE = 800
_GAP = 12
_TEXT_LINE = 20
_AXIS_TITLE = 30
_HEADER = 64
_LEAST_WIDTH = 440


def confusion_counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> NDArray[np.int64]:
    """How often each class (row) was taken for each (column): (L, L).

    Args:
        labels, predictions: (n,) int in [0, num_classes).
    """
    labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
    for name, values in (("labels", labels), ("predictions", predictions)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"{name} must be in [0, {num_classes}), got {values.min()} to {values.max()}")
    counts = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def write_confusion(counts: NDArray[np.int64], classes: Sequence[str], stem: Path) -> None:
    """Write counts (L, L) as `stem`.csv, and each class's share of answers in percent as `stem`.png.

    Under their final names the files are whole or not there. Up to 30 classes, the picture names them and has the
    numbers in its cells; beyond, it is a plain matrix in which every cell is at least a pixel.

    Args:
        classes: L names, in the order of the rows.
        stem: path of both files without their suffix.

    Raises:
        UserError: a file cannot be written.
    """
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(
            f"{len(classes)} classes have {len(classes)} x {len(classes)} counts, got {counts.shape}"
        )
    text = _csv(counts, classes).encode("utf-8", "backslashreplace")  # names of folders need not be Unicode
    write_atomically(stem.with_name(f"{stem.name}.csv"), lambda temporary: temporary.write_bytes(text))
    save_png(_picture(counts, classes), stem.with_name(f"{stem.name}.png"))


def _csv(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["true \\ predicted", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
    return buffer.getvalue()


def _picture(counts: NDArray[np.int64], classes: Sequence[str]) -> ByteArray:
    """(rows, cols, 3) uint8 RGB."""
    with warnings.catch_warnings():
        # A letter that the font lacks is a box in the picture; the CSV has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = _named(counts, classes) if len(classes) <= _MOST_NAMED else _plain(counts)
        _write_header(figure, counts)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _named(counts: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """With names beside the matrix and numbers in its cells."""
    names = [_shortened(name) for name in classes]
    longest = max(map(_text_width, names)) + _GAP
    cell = int(np.clip(_NAMED_SIDE // len(names), *_NAMED_CELL))
    upright = longest > cell
    figure, axes = _matrix(
        counts, cell, left=_AXIS_TITLE + longest, bottom=_AXIS_TITLE + (longest if upright else _TEXT_LINE)
    )
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.tick_params(length=0)
    for (row, col), share in np.ndenumerate(_shares(counts)):
        if share > 0:  # neither nothing nor a class without pictures
            number = f"{share:.0f}" if share >= 0.5 else "<1"
            color = "white" if share > _DARK else _INK
            axes.text(col, row, number, ha="center", va="center_baseline", fontsize=_FONT, color=color)
    return figure


def _plain(counts: NDArray[np.int64]) -> Figure:
    """With the classes' numbers on the axes, and a scale of the colours."""
    cell = max(1, _PLAIN_SIDE // len(counts))
    left, bottom, right = _AXIS_TITLE + 40, _AXIS_TITLE + _TEXT_LINE, 80
    figure, axes = _matrix(counts, cell, left=left, bottom=bottom, right=right)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10]))
    place, gap = axes.get_position(), _GAP / (figure.get_figwidth() * _DPI)
    beside = (place.x1 + gap, place.y0, gap, place.height)
    scale = figure.colorbar(axes.images[0], cax=figure.add_axes(beside), ticks=[0, 1, 5, 20, 50, 100])
    scale.outline.set_visible(False)
    scale.ax.tick_params(labelsize=_FONT, colors=_FAINT, length=3)
    scale.ax.yaxis.set_major_formatter("{x:g} %")
    return figure


def _matrix(
    counts: NDArray[np.int64], cell: int, *, left: int, bottom: int, right: int = _GAP
) -> tuple[Figure, Axes]:
    """The coloured cells alone, each `cell` pixels wide and high, with room around them in pixels."""
    side = cell * len(counts)
    width, height = max(left + side + right, _LEAST_WIDTH), _HEADER + side + bottom
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    colours = matplotlib.colormaps[_COLORMAP].with_extremes(bad=_EMPTY)
    scale = PowerNorm(_ROOT, vmin=0, vmax=100)
    # zorder: above the ends of the ticks, which would cover pixels of the outermost cells.
    axes.imshow(_shares(counts), cmap=colours, norm=scale, interpolation="nearest", aspect="auto", zorder=2.9)
    axes.set_xlabel("predicted class", fontsize=_FONT, color=_FAINT)
    axes.set_ylabel("true class", fontsize=_FONT, color=_FAINT)
    axes.tick_params(labelsize=_FONT, colors=_INK, length=3)
    axes.spines[:].set_visible(False)
    return figure, axes


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Counts in percent of their row (L, L); NaN in rows of classes without pictures."""
    pictures = counts.sum(axis=1, keepdims=True)
    empty = np.full(counts.shape, np.nan)
    return np.divide(100.0 * counts, pictures, out=empty, where=pictures > 0)


def _write_header(figure: Figure, counts: NDArray[np.int64]) -> None:
    pictures, present = int(counts.sum()), int((counts.sum(axis=1) > 0).sum())
    title = "no pictures"
    if pictures:
        balanced = np.nanmean(np.diag(_shares(counts)))
        title = f"top-1 {100 * np.trace(counts) / pictures:.2f} %,  balanced {balanced:.2f} %"
    about = f"{pictures:,} pictures of {present:,} classes; cells in % of the true class's pictures"
    width, height = figure.get_size_inches() * _DPI
    x = _GAP / width
    figure.text(x, 1 - 22 / height, title, fontsize=11, fontweight="bold", color=_INK, va="center")
    figure.text(x, 1 - 44 / height, about, fontsize=_FONT, color=_FAINT, va="center")


def _shortened(name: str) -> str:
    """On one line, its middle cut out where it is long: names often differ at their end."""
    line = " ".join(name.encode("utf-8", "backslashreplace").decode().split())
    if len(line) <= _NAME_HEAD + _NAME_TAIL + 1:
        return line
    return f"{line[:_NAME_HEAD]}…{line[-_NAME_TAIL:]}"


def _text_width(text: str) -> int:
    """In pixels."""
    renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()
    return math.ceil(renderer.get_text_width_height_descent(text, FontProperties(size=_FONT), False)[0])
