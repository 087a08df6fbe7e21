"""Several panels in one frame: labelled, on a dark ground, the same in every frame of a video."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw

from dino.attention.render import ByteArray
from dino.attention.sheet import font

_GROUND = (16, 16, 18)
_INK = (235, 235, 235)
# Of the shapes that a grid can have, the one nearest to that of a screen.
_SCREEN = 16 / 9


@dataclass(frozen=True)
class _Shape:
    """Of a grid, in pixels."""

    columns: int
    panel: tuple[int, int]
    text: int
    gap: int

    def size(self, panels: int) -> tuple[int, int]:
        lines = math.ceil(panels / self.columns)
        rows = lines * (self.panel[0] + self.strip) + (lines - 1) * self.gap
        return rows, self.columns * self.panel[1] + (self.columns - 1) * self.gap

    @property
    def strip(self) -> int:
        """Height of what a label stands in, above its panel."""
        return math.ceil(1.7 * self.text)


class Layout:
    """Panels of one size side by side, or in a grid whose shape is nearest to a screen's.

    Args:
        labels: one for each panel; all empty: no room is made for them.
        panel_size: (rows, cols) of the panels as they come.
        longest: side in pixels that the whole is shrunk to, never enlarged; 0: as the panels come.
        columns: panels beside each other; 0: the best for a screen.

    Attributes:
        size: (rows, cols) of the whole.
    """

    def __init__(
        self, labels: Sequence[str], panel_size: tuple[int, int], *, longest: int = 0, columns: int = 0
    ) -> None:
        self._count = len(labels)
        shapes = [
            _shape(columns_tried, labels, panel_size, longest)
            for columns_tried in ([columns] if columns else range(1, self._count + 1))
        ]
        self._shape = min(shapes, key=lambda shape: _unfitness(shape, self._count))
        self.size = self._shape.size(self._count)
        self._ground = self._draw_ground(labels)

    def __call__(self, panels: Sequence[ByteArray]) -> ByteArray:
        """The whole, (rows, cols, 3) uint8 RGB, from panels (rows, cols, 3) in the order of the labels."""
        if len(panels) != self._count:
            raise ValueError(f"the layout has {self._count} panels, got {len(panels)}")
        rows, cols = self._shape.panel
        if self._count == 1 and self._shape.text == 0 and panels[0].shape[:2] == (rows, cols):
            return panels[0]
        whole = self._ground.copy()
        for index, panel in enumerate(panels):
            top, left = self._corner(index)
            if panel.shape[:2] != (rows, cols):
                panel = cv2.resize(panel, (cols, rows), interpolation=cv2.INTER_AREA)
            whole[top : top + rows, left : left + cols] = panel
        return whole

    def _corner(self, index: int) -> tuple[int, int]:
        shape = self._shape
        line, column = divmod(index, shape.columns)
        top = line * (shape.panel[0] + shape.strip + shape.gap) + shape.strip
        return top, column * (shape.panel[1] + shape.gap)

    def _draw_ground(self, labels: Sequence[str]) -> ByteArray:
        shape = self._shape
        sheet = Image.new("RGB", (self.size[1], self.size[0]), _GROUND)
        if shape.text:
            pen = ImageDraw.Draw(sheet)
            for index, label in enumerate(labels):
                top, left = self._corner(index)
                middle = (left + shape.panel[1] / 2, top - shape.strip / 2)
                pen.text(middle, label, fill=_INK, font=font(shape.text), anchor="mm")
        return np.array(sheet)


def on_ground(panel: ByteArray) -> ByteArray:
    """The panel (rows, cols, 3); of one with alpha, what is transparent shows the ground."""
    if panel.shape[2] == 3:
        return panel
    return np.where(panel[..., 3:] > 0, panel[..., :3], np.array(_GROUND, np.uint8))


def _shape(columns: int, labels: Sequence[str], panel_size: tuple[int, int], longest: int) -> _Shape:
    """The grid of so many columns, at the largest scale that keeps it within `longest`."""
    labelled = any(labels)
    lines = math.ceil(len(labels) / columns)
    scale = 1.0
    if longest:
        scale = min(1.0, longest / (columns * panel_size[1]), longest / (lines * panel_size[0]))
    while True:
        panel = (max(1, round(panel_size[0] * scale)), max(1, round(panel_size[1] * scale)))
        text = min(28, max(9, min(panel) // 14)) if labelled else 0
        gap = 0 if len(labels) == 1 else max(2, min(panel) // 60)
        shape = _Shape(columns, panel, text, gap)
        if not longest or max(shape.size(len(labels))) <= longest or max(panel) <= 1:
            return shape
        scale *= 0.995


def _unfitness(shape: _Shape, panels: int) -> float:
    """How far from a screen's shape, and how much of it is left empty."""
    rows, cols = shape.size(panels)
    return abs(math.log(cols / rows / _SCREEN)) + -panels % shape.columns / panels
