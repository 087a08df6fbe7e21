"""Linear accuracy of frozen features by logistic regression (scikit-learn) on cached features.

python -m dino.evaluation.linear_probe --pretrained_weights checkpoint.pth --data_path photos/
"""

import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dino.evaluation.benchmark import FeatureOptions, LabelledFeatures, labelled_features
from dino.evaluation.scoring import balanced_accuracy, check_features
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option

PROTOCOL = "logistic regression on cached features"

_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_HELD_OUT = 0.2
_MAX_ITERATIONS = 300


@dataclass(frozen=True, eq=False)
class LinearResult:
    """Accuracies in percent on the test set, and what they are made of.

    Attributes:
        balanced: mean over the test set's classes of each class's top-1.
        chosen_c: inverse strength of the L2 penalty, chosen on a part of the training set.
        predictions: (n,) int64.
        correct: (n,) bool.
    """

    top1: float
    balanced: float
    chosen_c: float
    predictions: np.ndarray
    correct: np.ndarray


def logistic_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    grid: Sequence[float] = _GRID,
    seed: int = 0,
    progress: str | None = None,
) -> LinearResult:
    """Logistic regression on features standardised by the training set's mean and deviation.

    C is the one of `grid` that scores best on a fifth of the training pictures, held out class by class; then
    all training pictures are fitted with it. The test set is looked at once.

    Args:
        train, test: features (n, C).
        train_labels, test_labels: (n,) int.
        seed: of the held-out part.
        progress: title of the progress bar, None = no bar.

    Raises:
        UserError: one class only, widths that differ, or features that are not finite.
    """
    check_features(train, test)
    if len(np.unique(train_labels)) < 2:
        raise UserError("the training pictures are all of one class; a linear probe needs two or more")
    fitted, held_out = _split(train_labels, seed)
    scores: dict[float, float] = {}
    with tqdm(
        total=len(grid) + 1, desc=progress, unit="fit", disable=progress is None, dynamic_ncols=True
    ) as bar:
        # From strong to weak penalty, so that each fit starts from its neighbour's solution.
        model = _model()
        for c in sorted(grid):
            if len(held_out):
                _fit(model.set_params(logisticregression__C=c), train[fitted], train_labels[fitted])
                scores[c] = float(model.score(train[held_out], train_labels[held_out]))
            bar.update()
        # Of equal ones the strongest penalty; without a class of two pictures, scikit-learn's default.
        chosen = max(scores, key=lambda c: scores[c]) if scores else 1.0
        model = _fit(_model().set_params(logisticregression__C=chosen), train, train_labels)
        bar.update()
    predictions = model.predict(test).astype(np.int64)
    correct = predictions == test_labels
    return LinearResult(
        top1=100 * float(correct.mean()),
        balanced=balanced_accuracy(correct, test_labels),
        chosen_c=chosen,
        predictions=predictions,
        correct=correct,
    )


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to fit and to hold out. Every class keeps a picture to fit; a class of one holds out none."""
    generator = np.random.default_rng(seed)
    fitted, held_out = [], []
    for label in np.unique(labels):
        order = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(_HELD_OUT * len(order))), len(order) - 1)
        held_out.append(order[:count])
        fitted.append(order[count:])
    return np.concatenate(fitted), np.concatenate(held_out)


def _model() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True))


def _fit(model: Any, features: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Separable classes under a weak penalty have no finite optimum near; more steps change no prediction.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features.astype(np.float64), labels)


@dataclass(frozen=True)
class LinearOptions(FeatureOptions):
    output_dir: str = option(".", "Folder for results.json.")


def run(options: LinearOptions) -> None:
    output = Path(options.output_dir, "results.json")
    make_writable(output.parent, "--output_dir")
    sets = labelled_features(options)
    results = {}
    for name, (train, test) in _inputs(sets).items():
        results[name] = logistic_accuracy(
            train, sets.train_labels, test, sets.val_labels, seed=options.seed, progress=f"logistic, {name}"
        )
    print(f"{PROTOCOL}, {len(sets.classes)} classes:")
    print(f"{'features':<20} {'top-1':>7} {'balanced':>9} {'C':>8}")
    for name, result in results.items():
        print(f"{name:<20} {result.top1:>7.2f} {result.balanced:>9.2f} {result.chosen_c:>8g}")
    text = json.dumps(_report(options, sets, results), indent=1) + "\n"
    write_atomically(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"written to {output}")


def _inputs(sets: LabelledFeatures) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    train, val = sets.train, sets.val
    return {
        "CLS": (train.class_token, val.class_token),
        "CLS + patch mean": (
            np.concatenate([train.class_token, train.patch_mean], axis=1),
            np.concatenate([val.class_token, val.patch_mean], axis=1),
        ),
    }


def _report(
    options: LinearOptions, sets: LabelledFeatures, results: dict[str, LinearResult]
) -> dict[str, Any]:
    import sklearn
    import timm
    import torch

    return {
        "protocol": PROTOCOL,
        "command": shlex.join(sys.argv),
        "options": asdict(options),
        "weights_sha256": sets.weights_sha256,
        "versions": {package.__name__: package.__version__ for package in (torch, timm, sklearn, np)},
        "pictures": {"train": len(sets.train_labels), "val": len(sets.val_labels)},
        "broken": [*sets.train.broken, *sets.val.broken],
        "classes": sets.classes,
        "results": [
            {"features": name, "top1": result.top1, "balanced": result.balanced, "C": result.chosen_c}
            for name, result in results.items()
        ],
    }


def main() -> None:
    command(
        LinearOptions,
        run,
        prog="dino-linear",
        description="Linear accuracy of frozen features, by logistic regression.",
    )


if __name__ == "__main__":
    main()
