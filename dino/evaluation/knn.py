"""Weighted k-NN on frozen features (DINO, section 4.1; the vote of Wu et al., 2018).

n = pictures, k = neighbours, Q = queries of a block, L = classes
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from dino.evaluation.scoring import balanced_accuracy, check_features
from dino.evaluation.search import neighbours
from dino.runtime.options import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class KnnResult:
    """Accuracies in percent, and what they are made of.

    Attributes:
        top1, top5: share of pictures whose class has the most votes, is among the five with most votes (among
            the first k for k < 5, as DINO counts).
        balanced: mean over the test set's classes of each class's top-1.
        neighbours: how many voted: k, or the training set where k is larger.
        predictions: (n,) int64, the class with the most votes; of equal ones the first.
        correct: (n,) bool.
    """

    top1: float
    top5: float
    balanced: float
    neighbours: int
    predictions: np.ndarray
    correct: np.ndarray


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    exclude_self: bool = False,
    device: "torch.device | str | None" = None,
    progress: str | None = None,
) -> dict[int, KnnResult]:
    """Each of the k nearest by cosine votes for its class with the weight exp(cosine / temperature).

    One exact search for the largest k serves all: see `dino.evaluation.search`. A k above the training set means all
    of it: see `KnnResult.neighbours`.

    Args:
        train, test: features (n, C), of any scale; `np.memmap` stays on disk.
        train_labels, test_labels: (n,) in [0, num_classes).
        num_classes: None = one more than the largest label.
        exclude_self: leave-one-out: test is the training set, in its order, and no picture votes for itself.
        device: CUDA = the search runs there, with the same result; any other, or None = on the CPU.
        progress: title of the progress bar, None = no bar.

    Raises:
        UserError: no pictures, widths that differ, features that are not finite, k < 1 or temperature <= 0.
    """
    check_features(train, test)
    check_votes(ks, temperature)
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    available = len(train) - exclude_self
    if exclude_self and (len(train) != len(test) or not available):
        raise UserError(
            f"leave-one-out needs one set of 2 pictures or more, got {len(train)} and {len(test)}"
        )
    used = {k: min(k, available) for k in ks}
    steps = sorted(set(used.values()))
    predictions = {k: np.empty(len(test), dtype=np.int64) for k in steps}
    ranks = {k: np.empty(len(test), dtype=np.int64) for k in steps}
    with tqdm(
        total=len(test), desc=progress, unit="img", disable=progress is None, dynamic_ncols=True
    ) as bar:
        found = neighbours(train, test, steps[-1], exclude_self=exclude_self, device=device)
        for rows, cosine_Qk, neighbour_Qk in found:
            votes = _votes(cosine_Qk, train_labels[neighbour_Qk], steps, temperature, num_classes)
            for k, votes_QL in votes:
                predictions[k][rows] = votes_QL.argmax(axis=1)
                ranks[k][rows] = _ranks(votes_QL, test_labels[rows])
            bar.update(len(cosine_Qk))
    return {k: _result(predictions[used[k]], ranks[used[k]], test_labels, used[k]) for k in ks}


def check_votes(ks: Sequence[int], temperature: float = 1.0) -> None:
    """Refuse what no vote can be counted with, before long work.

    Raises:
        UserError: k < 1 or temperature <= 0.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"k must be 1 or more, got {', '.join(map(str, ks)) or 'none'}")
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature must be above 0 and finite, got {temperature}")


def _votes(
    cosine_Qk: np.ndarray, labels_Qk: np.ndarray, steps: Sequence[int], temperature: float, num_classes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """For each k of `steps` (rising), k and the votes (Q, L); the array is reused for the next k."""
    # The nearest weighs 1: a common factor changes no order, and exp cannot overflow at a low temperature.
    weights_Qk = np.exp((cosine_Qk - cosine_Qk[:, :1]) / temperature)
    votes_QL = np.zeros((len(cosine_Qk), num_classes))
    queries = np.arange(len(cosine_Qk))[:, None]
    for previous, k in zip([0, *steps], steps, strict=False):
        np.add.at(votes_QL, (queries, labels_Qk[:, previous:k]), weights_Qk[:, previous:k])
        yield k, votes_QL


def _ranks(votes_QL: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one (Q,); of classes with equal votes the lower comes first."""
    own = votes_QL[np.arange(len(labels)), labels][:, None]
    lower = np.arange(votes_QL.shape[1]) < labels[:, None]
    return np.count_nonzero((votes_QL > own) | ((votes_QL == own) & lower), axis=1)


def _result(predictions: np.ndarray, ranks: np.ndarray, labels: np.ndarray, neighbours: int) -> KnnResult:
    correct = ranks == 0
    return KnnResult(
        top1=100 * float(correct.mean()),
        top5=100 * float((ranks < min(5, neighbours)).mean()),
        balanced=balanced_accuracy(correct, labels),
        neighbours=neighbours,
        predictions=predictions,
        correct=correct,
    )
