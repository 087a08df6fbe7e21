"""The training curves of `log.txt` as one picture of small panels, drawn without pyplot's global state.

matplotlib is imported when they are drawn: a run starts sooner without.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dino.attention.render import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Log = Sequence[Mapping[str, Any]]

_INK = "#222222"
_FAINT = "#8a8a8a"
_LINE = "#1f5fa8"
_COLUMNS = 4
_PANEL_INCHES = (3.4, 2.5)
_DPI = 110


@dataclass(frozen=True)
class Panel:
    """One curve over the epochs; the keys are those of a row of `log.txt`."""

    key: str
    title: str
    unit: str = ""
    best: bool = False  # mark the highest point
    sparse: bool = False  # measured at some epochs only: show the points
    references: Mapping[str, str] = field(default_factory=dict)  # key of a level to compare with -> its label


PANELS = (
    Panel("train_loss", "Loss", "nats", references={"ln_k": "ln K: uniform output"}),
    Panel("teacher_entropy", "Teacher entropy", "nats", references={"ln_k": "ln K: uniform"}),
    Panel("kl", "KL(teacher ‖ student)", "nats"),
    Panel(
        "knn",
        "k-NN",
        "top-1 accuracy, %",
        best=True,
        sparse=True,
        references={"knn_random": "random network", "knn_init": "given weights"},
    ),
    Panel("feature_std", "Feature spread", "deviation per dimension"),
    Panel("effective_rank", "Effective rank of features", "dimensions"),
    Panel("train_lr", "Learning rate"),
    Panel("train_wd", "Weight decay"),
)


def draw_curves(log: Log, path: Path, panels: Sequence[Panel] = PANELS) -> None:
    """Draw the rows of `log.txt` as a PNG; under its final name the file is whole or not there.

    A curve whose key is nowhere in the log gets no panel; values that are missing or not finite leave gaps.
    Of rows with the same epoch (a run that was resumed) the last one counts.

    Args:
        log: rows with `epoch` and any of the panels' keys, and `loss_over_ln_k`.
        panels: what is drawn; those of a pre-training where nothing else is said.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = _by_epoch(log)
    panels = [panel for panel in panels if np.isfinite(_values(rows, panel.key)).any()]
    columns = max(1, min(_COLUMNS, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines)
    figure = Figure(figsize=size, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(lines, columns, index + 1), panel, rows)
    if not panels:
        figure.text(0.5, 0.5, "no epoch logged yet", ha="center", va="center", color=_INK)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(np.asarray(canvas.buffer_rgba())[..., :3].copy(), path)


def _by_epoch(log: Log) -> list[dict[str, Any]]:
    rows: dict[float, dict[str, Any]] = {}
    for index, row in enumerate(log):
        epoch = row.get("epoch", index)
        rows[epoch] = {**row, "epoch": epoch, "ln_k": _ln_k(row)}
    return [rows[epoch] for epoch in sorted(rows)]


def _ln_k(row: Mapping[str, Any]) -> float:
    """The loss of uniform output, from the loss and its ratio to it."""
    loss, ratio = row.get("train_loss"), row.get("loss_over_ln_k")
    return loss / ratio if loss is not None and ratio else math.nan


def _values(rows: Log, key: str) -> NDArray[np.float64]:
    """One value per row; NaN where there is none or it is not finite."""
    values = np.array([math.nan if row.get(key) is None else row[key] for row in rows], np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def _draw(axes: "Axes", panel: Panel, rows: Log) -> None:
    epochs, values = _values(rows, "epoch"), _values(rows, panel.key)
    there = np.isfinite(values)
    if panel.sparse:  # one line through the epochs that were measured
        epochs, values, there = epochs[there], values[there], there[there]
    alone = there & ~np.r_[False, there[:-1]] & ~np.r_[there[1:], False]
    axes.plot(epochs, values, color=_LINE, linewidth=1.6, zorder=3)
    marked = there if panel.sparse else alone
    axes.plot(epochs[marked], values[marked], "o", color=_LINE, markersize=3.5, zorder=3)
    if panel.best and there.any():
        _mark_best(axes, epochs, values)
    for key, label in panel.references.items():
        _draw_reference(axes, _values(rows, key), label)
    _dress(axes, panel)
    first, last = rows[0]["epoch"], rows[-1]["epoch"]
    room = max(0.5, 0.04 * (last - first))
    axes.set_xlim(first - room, last + room)


def _mark_best(axes: "Axes", epochs: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    best = int(np.nanargmax(values))
    axes.plot(epochs[best], values[best], "o", color=_LINE, markersize=6, zorder=4)
    axes.annotate(
        f"{values[best]:.1f}",
        (epochs[best], values[best]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        fontweight="bold",
        color=_LINE,
    )
    axes.margins(y=0.15)


def _draw_reference(axes: "Axes", values: NDArray[np.float64], label: str) -> None:
    """A dashed level with its name on it."""
    if np.isnan(values).all():
        return
    level = float(np.nanmedian(values))
    axes.axhline(level, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.annotate(
        label,
        (0.99, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color=_FAINT,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        zorder=2,
    )


def _dress(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.set_title(panel.unit, loc="right", fontsize=8, color=_FAINT)
    axes.set_xlabel("epoch", fontsize=8, color=_INK)
    axes.tick_params(labelsize=8, colors=_INK, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
