"""Logistic regression (scikit-learn) on cached features, its penalty chosen on held-out training pictures."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dino.evaluation.probe_result import (
    Choice,
    ProbeResult,
    best_setting,
    check_classes,
    probe_result,
    rank_labels,
)
from dino.evaluation.scoring import check_features
from dino.evaluation.splits import hold_out

_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_DEFAULT_C = 1.0  # scikit-learn's
_MAX_ITERATIONS = 300

# Bounds the memory beside the features: float64 copies (rows, C), scores (rows, classes).
_ROWS_PER_BLOCK = 4096

_WORTH_THREADS = 10**8  # products in a step of the fit


def logistic_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    grid: Sequence[float] = _GRID,
    seed: int = 0,
    progress: str | None = None,
) -> ProbeResult:
    """Logistic regression on features standardised by the training set's mean and deviation.

    C, the inverse strength of the L2 penalty, is the one of `grid` that scores best on `splits.hold_out`'s part of
    the training pictures, of equal ones the strongest penalty; then all training pictures are fitted with it.
    Where nothing can be held out, C is 1. The test set is looked at once.

    Args:
        train, test: features (n, C).
        train_labels, test_labels: (n,) int; a label of no training picture counts as wrong.
        seed: of the held-out part.
        progress: title of the progress bar, None = no bar.

    Raises:
        UserError: one class only, widths that differ, or features that are not finite.
    """
    check_features(train, test)
    check_classes(train_labels)
    fitted, held_out = hold_out(train_labels, seed)
    accuracies: dict[float, float] = {}
    with tqdm(
        total=len(grid) + 1, desc=progress, unit="fit", disable=progress is None, dynamic_ncols=True
    ) as bar:
        # From strong to weak penalty, so that each fit starts from its neighbour's solution.
        model = _model()
        for c in sorted(grid):
            if len(held_out):
                _fit(model.set_params(logisticregression__C=c), train[fitted], train_labels[fitted])
                _, ranks = _ranked(model, train[held_out], train_labels[held_out])
                accuracies[c] = 100 * float((ranks == 0).mean())
            bar.update()
        # Of equal ones the strongest penalty.
        choice = best_setting(accuracies, of_equal=min) if accuracies else Choice(_DEFAULT_C)
        model = _fit(_model().set_params(logisticregression__C=choice.setting), train, train_labels)
        bar.update()
    predictions, ranks = _ranked(model, test, test_labels)
    return probe_result(
        predictions, ranks, test_labels, num_classes=len(model.classes_), choice=choice, chosen_name="C"
    )


def _model() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True))


def _fit(model: Any, features: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # On small problems threads wait for each other longer than they work, on a busy machine a hundred times longer.
    threads = 1 if features.size * len(np.unique(labels)) < _WORTH_THREADS else None
    with warnings.catch_warnings(), threadpool_limits(threads):
        # Separable classes under a weak penalty have no finite optimum near; more steps change no prediction.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # Nor are many classes of one picture a mistake here.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        return model.fit(features.astype(np.float64), labels)


def _ranked(model: Any, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rank_labels` of the model's answers: predictions (n,) and ranks (n,)."""
    ranked = []
    for start in range(0, len(features), _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        scores = model.decision_function(features[rows].astype(np.float64))
        scores_QL = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores
        ranked.append(rank_labels(scores_QL, model.classes_, labels[rows]))
    predictions, ranks = map(np.concatenate, zip(*ranked, strict=True))
    return predictions, ranks
