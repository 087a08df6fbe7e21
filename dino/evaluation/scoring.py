"""What k-NN and linear probe share: which features they refuse, and the score that weighs classes equally."""

import numpy as np

from dino.runtime.options import UserError


def check_features(train: np.ndarray, test: np.ndarray) -> None:
    """Refuse features (n, C) that cannot be scored.

    Raises:
        UserError: no pictures, widths that differ, or values that are not finite.
    """
    if not len(train) or not len(test):
        raise UserError(f"pictures to train and to test on are needed, got {len(train)} and {len(test)}")
    if train.shape[1] != test.shape[1]:
        raise UserError(
            f"the training features are {train.shape[1]} wide and the test features {test.shape[1]}: "
            "take both from the same backbone"
        )
    # A sum is finite only if all its terms are, and takes no copy of the features.
    damaged = sum(int((~np.isfinite(part.sum(axis=1, dtype=np.float64))).sum()) for part in (train, test))
    if damaged:
        raise UserError(
            f"the features of {damaged} pictures are not finite (nan or infinity): "
            "the weights are damaged, or the precision is too low (try --precision fp32)"
        )


def per_class_accuracy(correct: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """Accuracy of each class that occurs in `labels`, in percent, by its number, in rising order."""
    counts = np.bincount(labels)
    right = np.bincount(labels, weights=correct)
    return {label: 100 * float(right[label] / counts[label]) for label in np.flatnonzero(counts).tolist()}


def balanced_accuracy(correct: np.ndarray, labels: np.ndarray) -> float:
    """Mean accuracy of the classes that occur in `labels`, in percent: all classes weigh the same."""
    return float(np.mean(list(per_class_accuracy(correct, labels).values())))
