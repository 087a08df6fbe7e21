"""How good a classifier is on the val pictures, while it is trained and at its end."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino.evaluation.confusion import confusion_counts, write_confusion
from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.linear_classifier import Scores, score
from dino.evaluation.results import write_results
from dino.runtime.pictures import Pictures


@dataclass
class Judge:
    """Scores networks on the same pictures, and remembers the last scores.

    Attributes:
        numbers: (classes of val,) int64: which output each class is.
        batch_size: pictures per forward pass.
        last: of the network that was judged last; None before.
    """

    preparation: Preparation
    val: Pictures
    numbers: np.ndarray
    batch_size: int
    device: torch.device
    num_workers: int
    last: Scores | None = None

    def scores(self, network: nn.Module, progress: str | None = None) -> Scores:
        """Over all processes together, each of which gets them.

        Args:
            network: on the device.
            progress: title of a bar; None = no bar.
        """
        extractor = Extractor(
            network,
            self.preparation,
            batch_size=self.batch_size,
            device=self.device,
            num_workers=self.num_workers,
        )
        self.last = score(extractor, _logits, nn.Identity(), self.val, self.numbers, progress=progress)
        return self.last

    def measures(self, network: nn.Module) -> dict[str, float]:
        """The same as plain numbers, under the names of XCiT's log."""
        title = "val pictures" if sys.stderr.isatty() else None  # below the bar of the steps
        return {f"test_{name}": value for name, value in measures_of(self.scores(network, title)).items()}


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    return network(images).float()


def measures_of(scores: Scores) -> dict[str, float]:
    """Accuracies in percent, and the loss."""
    five = {} if scores.top5 is None else {"acc5": scores.top5}
    return {"acc1": scores.top1, **five, "balanced": scores.balanced, "loss": scores.loss}


def write_scores(
    folder: Path, name: str, facts: Mapping[str, Any], scores: Scores, classes: Sequence[str]
) -> None:
    """The confusion matrix of some scores, and an entry of that name in `results.json`.

    Args:
        facts: plain values for the entry.
        classes: a name for each output.

    Raises:
        UserError: a file cannot be written.
    """
    counts = confusion_counts(scores.labels, scores.predictions, len(classes))
    write_confusion(counts, classes, folder / "confusion")
    print(f"confusion matrix: {folder / 'confusion.png'}, {folder / 'confusion.csv'}")
    print(f"written to {write_results(folder, name, facts)}")
