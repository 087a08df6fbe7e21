"""The scores of many pictures: their means, as a table, as JSON and as CSV."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino.attention.heads import head_number, label
from dino.runtime.files import write_atomically

BEST = "best head"
AUTO = "auto"
WHOLE = "whole picture"
DISC = "centred disc"


@dataclass(frozen=True)
class PictureScore:
    """Jaccard similarities in [0, 1] of one picture, each the mean over its objects.

    Attributes:
        values: by what was compared with the objects: `mean`, `head0`, ..., `BEST` (of the heads for each object),
            `WHOLE` and `DISC`.
    """

    name: str
    objects: int
    values: dict[str, float]


@dataclass(frozen=True)
class Mean:
    """Over pictures, with its standard error; that is NaN for a single picture."""

    value: float
    error: float

    def plain(self) -> dict[str, float | None]:
        return {"jaccard": self.value, "standard_error": None if math.isnan(self.error) else self.error}


def means(scores: Sequence[PictureScore]) -> dict[str, Mean]:
    """Of every value over the pictures: each picture weighs the same, as in the DINO paper."""
    table: dict[str, Mean] = {}
    for name in scores[0].values:
        values = np.array([score.values[name] for score in scores])
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan
        table[name] = Mean(float(values.mean()), error)
    return table


def best_single(table: dict[str, Mean]) -> str | None:
    """Name of the head that is best over all pictures; None where no single heads are compared."""
    return max(_single_heads(table), key=lambda name: table[name].value, default=None)


def as_text(table: dict[str, Mean], picked: Sequence[int]) -> str:
    """Lines of a name, the mean in percent and its standard error; first what sums the heads up."""
    single = best_single(table)
    lines = [_line("best head for each object (the masks choose)", table.get(BEST))]
    if single:
        lines.append(_line(f"best single head: {label(single)} (the masks choose)", table[single]))
    lines.append(_line(f"heads picked without labels: mean of {_listed(picked)}", table.get(AUTO)))
    singles = _single_heads(table)
    which = "the heads below" if singles else "all heads"
    lines += [_line(f"mean of {which}", table.get("mean")), _line(f"maximum of {which}", table.get("max"))]
    lines += [_line(label(name), table[name]) for name in singles]
    lines.append(_line("chance: the whole picture", table[WHOLE]))
    lines.append(_line("chance: a centred disc as large as the object", table[DISC]))
    return "\n".join(line for line in lines if line)


def as_plain(table: dict[str, Mean]) -> dict[str, Any]:
    """The same for JSON, in [0, 1]."""
    return {name.replace(" ", "_"): mean.plain() for name, mean in table.items()}


def write_csv(scores: Sequence[PictureScore], path: Path) -> None:
    """One row for each picture: its name, how many objects it has, and the values.

    Raises:
        UserError: the file cannot be written.
    """
    names = list(scores[0].values)

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["picture", "objects", *(name.replace(" ", "_") for name in names)])
            for score in scores:
                rows.writerow([score.name, score.objects, *(f"{score.values[name]:.6f}" for name in names)])

    write_atomically(path, write)


def _line(name: str, mean: Mean | None) -> str:
    if mean is None:
        return ""
    error = "" if math.isnan(mean.error) else f" ± {100 * mean.error:.1f}"
    return f"  {name:<50} {100 * mean.value:5.1f}{error}"


def _single_heads(table: dict[str, Mean]) -> list[str]:
    return [name for name in table if head_number(name) is not None]


def _listed(heads: Sequence[int]) -> str:
    return ", ".join(map(str, heads))
