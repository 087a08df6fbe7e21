"""The page of a training run: its numbers, its curves, and attention as it emerged, in `index.html` of its folder.

    write_run_page(folder, read_log(folder), "DINO on photos")

The page is one file that asks no network; the curves and the attention sheets are linked from the folder.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dino.attention.page import assemble, escape, link
from dino.runtime.files import write_atomically, writing

NAME = "index.html"

_SHEET = re.compile(r"epoch_(\d+)\.png")
_MISSING = "–"  # noqa: RUF001 - what stands in a table for no number

# What a run starts from, by the key of its accuracy in the log.
_STARTS = {"knn_random": "random network", "knn_init": "given weights"}


@dataclass(frozen=True)
class _Look:
    """What was measured after so many epochs; 0 is the network before training. Accuracies in percent."""

    epochs: int
    knn: float
    balanced: float | None = None
    start: float | None = None  # accuracy before training
    loss: float | None = None


def write_run_page(
    folder: Path, rows: Sequence[Mapping[str, Any]], title: str, *, neighbours: int = 20
) -> Path:
    """Write the page; under its final name it is whole or not there. Returns its path.

    Args:
        folder: the run's, with `curves.png` and the sheets `attention/epoch_NNNN.png`, as far as there are any.
        rows: those of `log.txt`; of rows with the same epoch the last one counts, and values that are missing
            or not finite are left out.
        title: heading of the page.
        neighbours: that vote in `knn`.

    Raises:
        UserError: it cannot be written.
    """
    by_epoch = {int(row.get("epoch", index)): row for index, row in enumerate(rows)}
    looks = list(_looks(by_epoch))
    page = assemble(
        "run.html",
        styles=("page.css", "run.css"),
        scripts=("run.js",),
        parts={
            "title": escape(title),
            "headline": _headline(by_epoch, looks, neighbours),
            "timelapse": _timelapse(folder, {look.epochs: look for look in looks}, neighbours),
            "curves": _curves(folder),
            "table": _table(looks, neighbours),
        },
    )
    path = folder / NAME
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _looks(rows: Mapping[int, Mapping[str, Any]]) -> Iterator[_Look]:
    measured = [(epoch, row) for epoch, row in sorted(rows.items()) if _number(row, "knn") is not None]
    starts = [
        accuracy for _, row in measured for key in _STARTS if (accuracy := _number(row, key)) is not None
    ]
    start = starts[-1] if starts else None
    if start is not None:
        yield _Look(0, start, start=start)
    for epoch, row in measured:
        knn = _number(row, "knn")
        assert knn is not None
        balanced, loss = _number(row, "knn_balanced"), _number(row, "train_loss")
        yield _Look(epoch + 1, knn, balanced, start, loss)


def _headline(rows: Mapping[int, Any], looks: Sequence[_Look], neighbours: int) -> str:
    tiles = []
    trained = [look for look in looks if look.epochs]
    if trained:
        best = max(trained, key=lambda look: look.knn)
        tiles += [
            (f"{neighbours}-NN accuracy {_when(trained[-1].epochs)}", _percent(trained[-1].knn)),
            (f"the best, {_when(best.epochs)}", _percent(best.knn)),
        ]
    if looks and not looks[0].epochs:
        known = {key for row in rows.values() for key in _STARTS if _number(row, key) is not None}
        kind = next(kind for key, kind in _STARTS.items() if key in known)
        tiles.append((f"of the {kind} before training", _percent(looks[0].knn)))
    epochs = max(rows, default=-1) + 1
    tiles.append((f"{'epoch' if epochs == 1 else 'epochs'} trained", str(epochs)))
    first, *others = [f"<dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles]
    cards = f'<div class="card main">{first}' + "".join(f'<div class="card">{tile}' for tile in others)
    return f'<dl class="headline">{cards}</dl>'


def _timelapse(folder: Path, looks: Mapping[int, _Look], neighbours: int) -> str:
    """The sheets with a slider; without scripts, the last sheet."""
    attention = folder / "attention"
    found = attention.iterdir() if attention.is_dir() else ()
    files = {int(match[1]): file for file in found if (match := _SHEET.fullmatch(file.name))}
    if not files:
        return ""
    sheets = []
    for epochs, file in sorted(files.items()):
        label = _when(epochs)
        if epochs in looks:
            label += f" · {neighbours}-NN {_percent(looks[epochs].knn)}"
        sheets.append({"address": link(file, folder), "label": label})
    last = sheets[-1]
    return (
        '<section class="card timelapse" aria-labelledby="emerging">'
        '<h2 id="emerging">Attention emerging</h2>'
        f'<a href="{last["address"]}"><img class="sheet" id="sheet" src="{last["address"]}"'
        f'{_size(files[max(files)])} alt="Attention maps, {last["label"]}"></a>'
        '<div class="player" id="player" role="group" aria-label="Time-lapse" hidden>'
        '<p id="label"></p>'
        '<button type="button" id="play">Play</button>'
        f'<input type="range" id="epoch" min="0" max="{len(sheets) - 1}" step="1" value="{len(sheets) - 1}" '
        'aria-label="Epoch"></div>'
        '<p class="soft"><kbd>←</kbd> <kbd>→</kbd> go from sheet to sheet; '
        "on the slider, <kbd>Space</kbd> plays and pauses.</p>"
        f'<script type="application/json" id="sheets">{json.dumps(sheets)}</script></section>'
    )


def _size(file: Path) -> str:
    """The sheet's sides as attributes, so that the page does not jump when it is loaded."""
    try:
        with Image.open(file) as image:
            return f' width="{image.width}" height="{image.height}"'
    except (OSError, UnidentifiedImageError):
        return ""


def _curves(folder: Path) -> str:
    if not (folder / "curves.png").is_file():
        return ""
    alt = "Training curves over the epochs; the table below has the k-NN accuracies, log.txt all numbers"
    return (
        '<section class="card curves" aria-labelledby="curves"><h2 id="curves">Curves</h2>'
        f'<a href="curves.png"><img src="curves.png" alt="{alt}"></a></section>'
    )


def _table(looks: Sequence[_Look], neighbours: int) -> str:
    if not looks:
        return '<p class="soft">No k-NN accuracy has been measured.</p>'
    columns = ("When", f"{neighbours}-NN, %", "balanced, %", "over the start, points", "loss")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    best = max(looks, key=lambda look: look.knn)
    body = "".join(_table_row(look, look is best) for look in looks)
    return (
        '<div class="card scroll" role="region" aria-labelledby="looks" tabindex="0"><table>'
        f'<caption id="looks">Accuracy of {neighbours} nearest neighbours</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table_row(look: _Look, is_best: bool) -> str:
    gain = None if look.start is None or not look.epochs else look.knn - look.start
    cells = [
        f"{look.knn:.1f}",
        _MISSING if look.balanced is None else f"{look.balanced:.1f}",
        _MISSING if gain is None else f"{gain:+.1f}",
        _MISSING if look.loss is None else f"{look.loss:.3f}",
    ]
    name = _when(look.epochs) + (", the best" if is_best else "")
    row = f'<th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="best">{row}</tr>' if is_best else f"<tr>{row}</tr>"


def _when(epochs: int) -> str:
    if not epochs:
        return "before training"
    return f"after {epochs} epoch{'s' * (epochs > 1)}"


def _percent(accuracy: float) -> str:
    return f"{accuracy:.1f} %"
