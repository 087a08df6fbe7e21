"""Accuracy of frozen features with a few labelled pictures per class, by logistic regression on several draws.

Which pictures are drawn matters as much as the features do, so that one draw says little: hence mean and spread.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from dino.evaluation.logistic import logistic_accuracy
from dino.evaluation.probe_result import check_classes
from dino.evaluation.scoring import check_features
from dino.evaluation.splits import draw_shots
from dino.runtime.options import UserError


@dataclass(frozen=True)
class FewShotResult:
    """Top-1 in percent on the test set, over the draws.

    Attributes:
        spread: standard deviation of one draw; 0 where there is only one.
        accuracies: one for each draw.
        small_classes: how many classes have fewer pictures than asked, and gave all.
    """

    mean: float
    spread: float
    accuracies: tuple[float, ...]
    small_classes: int


def few_shot_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    shots: Sequence[int] = (1, 5, 10),
    draws: int = 5,
    seed: int = 0,
    progress: str | None = None,
) -> dict[int, FewShotResult]:
    """For each number of shots, `logistic.logistic_accuracy` on that many pictures of every class.

    The penalty is chosen on the draw itself: no other labelled picture is used. A draw of fewer shots is a part of
    the same draw of more, so that what differs between shots is not the luck of the draw.

    Args:
        train, test: features (n, C).
        train_labels, test_labels: (n,) int.
        shots: pictures of every class.
        progress: title of the progress bar, None = no bar.

    Raises:
        UserError: fewer than 1 shot or draw, one class only, widths that differ, or features that are not finite.
    """
    if not shots or min(shots) < 1 or draws < 1:
        raise UserError(
            f"few-shot accuracy needs 1 shot and 1 draw or more, got {list(shots)} shots and {draws} draws"
        )
    check_features(train, test)
    check_classes(train_labels)
    # A seed of its own for every draw, and the same for all shots.
    seeds = np.random.default_rng(seed).integers(2**32, size=draws).tolist()
    accuracies: dict[int, list[float]] = {number: [] for number in shots}
    with tqdm(
        total=len(accuracies) * draws,
        desc=progress,
        unit="draw",
        disable=progress is None,
        dynamic_ncols=True,
    ) as bar:
        for number, of_draw in accuracies.items():
            for draw_seed in seeds:
                rows = draw_shots(train_labels, number, draw_seed)
                result = logistic_accuracy(train[rows], train_labels[rows], test, test_labels, seed=draw_seed)
                of_draw.append(result.top1)
                bar.update()
    sizes = np.unique(train_labels, return_counts=True)[1]
    return {
        number: FewShotResult(
            mean=statistics.fmean(of_draw),
            spread=statistics.stdev(of_draw) if draws > 1 else 0.0,
            accuracies=tuple(of_draw),
            small_classes=int((sizes < number).sum()),
        )
        for number, of_draw in accuracies.items()
    }
