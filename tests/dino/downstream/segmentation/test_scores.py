import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score

from dino.downstream.segmentation.classes import VOID, Classes
from dino.downstream.segmentation.scores import Scores, count, table

CLASSES = Classes((1, 2, 3, 4, 9), ("a", "b", "c", "d", "e"))


def pictures(classes, seed=0):
    """Places with void pixels, and predictions that are mostly right."""
    noise = np.random.default_rng(seed)
    for rows, cols in ((20, 30), (7, 11), (1, 5)):
        places = noise.integers(-1, classes, (rows, cols)).astype(np.int16)
        other = noise.integers(0, classes, (rows, cols)).astype(np.int16)
        yield places, np.where((noise.random((rows, cols)) < 0.6) & (places != VOID), places, other)


def test_measures_are_those_of_scikit_learn_over_all_judged_pixels():
    counts = sum(count(places, predicted, 5) for places, predicted in pictures(5))
    pairs = [(p[p != VOID], q[p != VOID]) for p, q in pictures(5)]
    true, predicted = (np.concatenate(part) for part in zip(*pairs, strict=True))
    measures = Scores(counts).measures()
    assert measures["miou"] == pytest.approx(100 * jaccard_score(true, predicted, average="macro"))
    assert measures["pixel_accuracy"] == pytest.approx(100 * accuracy_score(true, predicted))
    assert measures["mean_accuracy"] == pytest.approx(100 * balanced_accuracy_score(true, predicted))
    each = jaccard_score(true, predicted, average=None)
    assert [row["iou"] for row in Scores(counts).by_class(CLASSES)] == pytest.approx(100 * each, abs=1e-3)


def test_a_class_that_is_nowhere_has_no_value_and_no_part_in_the_mean():
    counts = np.zeros((5, 5), np.int64)
    counts[0, 0], counts[1, 1], counts[1, 2] = 10, 5, 5
    scores = Scores(counts)
    assert np.allclose(scores.iou[:3], [1, 0.5, 0])
    assert np.isnan(scores.iou[3:]).all()
    assert scores.measures()["miou"] == pytest.approx(50)
    assert scores.measures()["mean_accuracy"] == pytest.approx(75)
    rows = scores.by_class(CLASSES)
    assert [row["accuracy"] for row in rows] == [100, 50, None, None, None]
    assert [row["pixels"] for row in rows] == [50, 50, 0, 0, 0]


def test_nothing_judged_is_no_measure_and_no_error():
    places = np.full((4, 4), VOID, np.int16)
    scores = Scores(count(places, np.zeros((4, 4), np.int16), 5))
    assert scores.measures() == {"miou": 0, "pixel_accuracy": 0, "mean_accuracy": 0}


def test_the_table_has_a_line_for_each_class():
    counts = np.diag([3, 0, 1, 0, 0])
    lines = table(Scores(counts).by_class(Classes((0, 1, 2, 3, 4), ("sky", "道路", "c", "d", "e"))))
    assert len(lines) == 6
    assert lines[1].split() == ["sky", "100.00", "100.00", "75.00"]
    assert lines[2].split() == ["道路", "-", "-", "0.00"]
