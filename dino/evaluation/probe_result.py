"""How a linear probe is judged: the choice of its setting, the ranking of its scores, and its accuracies.

Q = pictures of a block, L = classes
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dino.evaluation.scoring import balanced_accuracy
from dino.runtime.options import UserError

_TOP = 5


@dataclass(frozen=True)
class Choice:
    """A setting and how it was found.

    Attributes:
        held_out: accuracy on the pictures that were held out to choose it, in percent; None where none could be
            held out, and the setting is a default.
        at_edge: it is the lowest or highest of those tried and none between them does as well, so that a better
            one may lie beyond.
    """

    setting: float
    held_out: float | None = None
    at_edge: bool = False


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Accuracies in percent on the test set, and what they are made of.

    Attributes:
        top5: None where fewer than 5 classes were trained.
        balanced: mean over the test set's classes of each class's top-1.
        held_out, at_edge: those of `Choice`.
        chosen: the setting, which is what `chosen_name` says: a learning rate, or logistic regression's C.
        predictions: (n,) int64.
        correct: (n,) bool.
    """

    top1: float
    top5: float | None
    balanced: float
    held_out: float | None
    chosen: float
    chosen_name: Literal["lr", "C"]
    at_edge: bool
    predictions: np.ndarray
    correct: np.ndarray


def check_classes(train_labels: np.ndarray) -> None:
    """Refuse labels that leave nothing to tell apart.

    Raises:
        UserError: one class only.
    """
    if len(np.unique(train_labels)) < 2:
        raise UserError("the training pictures are all of one class; a linear probe needs two or more")


def best_setting(accuracies: Mapping[float, float], of_equal: Callable[[list[float]], float]) -> Choice:
    """The setting with the highest accuracy in percent, never one that is NaN.

    Args:
        of_equal: which to take of several that are as good, rising: few pictures held out make many equal.
    """
    tried = sorted(accuracies)
    highest = max((value for value in accuracies.values() if not math.isnan(value)), default=math.nan)
    best = [setting for setting in tried if accuracies[setting] == highest] or tried
    inside = any(setting in best for setting in tried[1:-1])
    setting = of_equal(best)
    return Choice(setting, accuracies[setting], at_edge=len(tried) > 1 and not inside)


def rank_labels(
    scores_QL: np.ndarray, classes: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The class with the highest score, and how many classes come before the right one.

    Of classes with equal scores the first comes first. A label that is not among the classes comes after all of
    them, and so does one whose score is NaN.

    Args:
        scores_QL: one score for each of `classes`.
        classes: (L,) int, rising.
        labels: (Q,) int.

    Returns:
        predictions (Q,) int64 and ranks (Q,) int64.
    """
    column = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    own = np.take_along_axis(scores_QL, column[:, None], axis=1)
    not_before = np.arange(len(classes)) >= column[:, None]
    behind = np.count_nonzero((scores_QL < own) | ((scores_QL == own) & not_before), axis=1)
    ranks = np.where(classes[column] == labels, len(classes) - behind, len(classes))
    return classes[scores_QL.argmax(axis=1)].astype(np.int64), ranks


def probe_result(
    predictions: np.ndarray,
    ranks: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    choice: Choice,
    chosen_name: Literal["lr", "C"],
) -> ProbeResult:
    """The accuracies of `rank_labels`' predictions and ranks.

    Args:
        predictions, ranks, labels: (n,) int.
        num_classes: how many classes were trained.
    """
    correct = ranks == 0
    return ProbeResult(
        top1=100 * float(correct.mean()),
        top5=100 * float((ranks < _TOP).mean()) if num_classes >= _TOP else None,
        balanced=balanced_accuracy(correct, labels),
        held_out=choice.held_out,
        chosen=choice.setting,
        chosen_name=chosen_name,
        at_edge=choice.at_edge,
        predictions=predictions,
        correct=correct,
    )
