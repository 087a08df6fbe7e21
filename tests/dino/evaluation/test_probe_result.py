import math
from statistics import median_low

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from dino.evaluation.probe_result import Choice, best_setting, check_classes, probe_result, rank_labels
from dino.runtime.options import UserError


def test_ranks_equal_a_stable_sort_of_every_row_with_ties():
    generator = np.random.default_rng(0)
    classes = np.array([1, 4, 5, 9])
    scores = generator.integers(0, 3, (200, 4)).astype(np.float32)
    labels = generator.choice(classes, 200)
    predictions, ranks = rank_labels(scores, classes, labels)
    for row, label, prediction, rank in zip(scores, labels, predictions, ranks, strict=True):
        order = classes[np.argsort(-row, kind="stable")].tolist()
        assert (prediction, rank) == (order[0], order.index(label))


def test_a_label_that_was_not_trained_or_whose_score_is_nan_comes_last():
    scores = np.array([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [math.nan, 1.0]])
    _, ranks = rank_labels(scores, np.array([2, 5]), np.array([0, 3, 8, 2]))
    assert ranks.tolist() == [2, 2, 2, 2]


def test_accuracies_equal_scikit_learn():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(300, 7)), generator.integers(0, 7, 300)
    predictions, ranks = rank_labels(scores, np.arange(7), labels)
    result = probe_result(
        predictions, ranks, labels, num_classes=7, choice=Choice(0.1, 50.0, True), chosen_name="lr"
    )
    assert result.top1 == pytest.approx(100 * (scores.argmax(1) == labels).mean())
    assert result.top5 == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5))
    assert result.balanced == pytest.approx(100 * balanced_accuracy_score(labels, predictions))
    assert (result.chosen, result.chosen_name, result.held_out, result.at_edge) == (0.1, "lr", 50.0, True)
    np.testing.assert_array_equal(result.correct, predictions == labels)


@pytest.mark.parametrize(("num_classes", "top5"), [(2, None), (4, None), (5, 100)])
def test_top5_needs_five_classes(num_classes, top5):
    zeros = np.zeros(3, np.int64)
    result = probe_result(zeros, zeros, zeros, num_classes=num_classes, choice=Choice(1.0), chosen_name="C")
    assert result.top5 == top5 and result.held_out is None


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ({1.0: 50, 0.1: 60, 10.0: 40}, Choice(0.1, 60, at_edge=True)),
        ({1.0: 70, 0.1: 60, 10.0: 40}, Choice(1.0, 70, at_edge=False)),
        ({10.0: 70, 1.0: 60, 0.1: 40}, Choice(10.0, 70, at_edge=True)),
        ({10.0: 70, 1.0: 70, 0.1: 40}, Choice(1.0, 70, at_edge=False)),
        ({10.0: 40, 1.0: 70, 0.1: 70}, Choice(0.1, 70, at_edge=False)),
        (dict.fromkeys((10.0, 1.0, 0.1, 0.01), 70) | {0.001: 0}, Choice(0.1, 70, at_edge=False)),
        ({0.1: math.nan, 1.0: 0, 10.0: math.nan}, Choice(1.0, 0, at_edge=False)),
        ({0.1: 5}, Choice(0.1, 5, at_edge=False)),
    ],
)
def test_the_best_setting_is_chosen_of_equal_ones_the_middle_and_never_nan(accuracies, expected):
    assert best_setting(accuracies, of_equal=median_low) == expected


def test_of_equal_settings_the_callers_is_taken():
    accuracies = {0.1: 5.0, 1.0: 7.0, 10.0: 7.0, 100.0: 7.0}
    assert best_setting(accuracies, of_equal=min).setting == 1.0
    assert best_setting(accuracies, of_equal=max).setting == 100.0


def test_one_class_is_nothing_to_tell_apart():
    with pytest.raises(UserError, match="all of one class; a linear probe needs two or more"):
        check_classes(np.full(5, 3))
    check_classes(np.array([3, 4]))
