"""How good a segmentation is: intersection over union, from one confusion matrix over all pixels.

K classes; rows of the matrix are the true classes, columns the predicted ones. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.downstream.segmentation.classes import VOID, Classes, PlaceArray
from dino.evaluation.confusion import confusion_counts


@dataclass(frozen=True, eq=False)
class Scores:
    """Of counts (K, K). A class that is neither there nor predicted has no value (NaN) and no part in a mean."""

    counts_KK: NDArray[np.int64]

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class (K,), in [0, 1]."""
        right = np.diag(self.counts_KK)
        return _ratio(right, self.counts_KK.sum(axis=0) + self.counts_KK.sum(axis=1) - right)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Part of each class's pixels that are found (K,), in [0, 1]."""
        return _ratio(np.diag(self.counts_KK), self.counts_KK.sum(axis=1))

    def measures(self) -> dict[str, float]:
        """In percent; 0 where no pixel is judged."""
        pixels = max(int(self.counts_KK.sum()), 1)
        return {
            "miou": _mean(self.iou),
            "pixel_accuracy": 100 * float(np.trace(self.counts_KK)) / pixels,
            "mean_accuracy": _mean(self.accuracy),
        }

    def by_class(self, classes: Classes) -> list[dict[str, Any]]:
        """Plain values of each class, in percent; None where it has none."""
        share_K = _ratio(self.counts_KK.sum(axis=1), np.asarray(max(int(self.counts_KK.sum()), 1)))
        columns = {"iou": self.iou, "accuracy": self.accuracy, "pixels": share_K}
        return [
            {
                "id": number,
                "name": name,
                **{column: _percent(values[place]) for column, values in columns.items()},
            }
            for place, (number, name) in enumerate(zip(classes.ids, classes.names, strict=True))
        ]


def count(places: PlaceArray, predicted: PlaceArray, num_classes: int) -> NDArray[np.int64]:
    """The confusion matrix of one picture, over the pixels that are judged."""
    judged = places != VOID
    return confusion_counts(places[judged], predicted[judged], num_classes)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines with a class each, of what `Scores.by_class` gives."""
    width = max(len("class"), *(len(row["name"]) for row in rows))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'accuracy':>8}  {'of pixels':>9}"]
    for row in rows:
        lines.append(
            f"{row['name']:<{width}}  {_shown(row['iou']):>6}  {_shown(row['accuracy']):>8}  "
            f"{_shown(row['pixels']):>9}"
        )
    return lines


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    nothing = np.full(part.shape, np.nan)
    return np.divide(part, whole, out=nothing, where=np.broadcast_to(whole > 0, part.shape))


def _mean(values_K: NDArray[np.float64]) -> float:
    known = values_K[~np.isnan(values_K)]
    return 100 * float(known.mean()) if len(known) else 0.0


def _percent(value: float) -> float | None:
    return None if np.isnan(value) else round(100 * float(value), 4)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
