import numpy as np
import pytest

from dino.evaluation import few_shot
from dino.evaluation.few_shot import few_shot_accuracy
from dino.evaluation.logistic import logistic_accuracy
from dino.runtime.options import UserError


def clusters(count, seed, classes=4, width=8, distance=1.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = distance * np.random.default_rng(99).normal(size=(classes, width))
    return (centres[labels] + generator.normal(size=(count, width))).astype(np.float32), labels


def test_mean_and_spread_are_those_of_the_draws():
    train, train_labels = clusters(80, seed=0)
    test, test_labels = clusters(40, seed=1)
    results = few_shot_accuracy(train, train_labels, test, test_labels, shots=(1, 5), draws=4, seed=0)
    assert list(results) == [1, 5]
    for result in results.values():
        assert len(result.accuracies) == 4
        assert result.mean == pytest.approx(np.mean(result.accuracies))
        assert result.spread == pytest.approx(np.std(result.accuracies, ddof=1))
        assert result.small_classes == 0
    assert results[5].mean > results[1].mean


def test_every_draw_is_a_logistic_regression_on_nested_pictures(monkeypatch):
    train, train_labels = clusters(80, seed=0)
    drawn = []

    def recorded(features, labels, *rest, **settings):
        drawn.append((features, labels))
        return logistic_accuracy(features, labels, *rest, **settings)

    monkeypatch.setattr(few_shot, "logistic_accuracy", recorded)
    few_shot_accuracy(train, train_labels, train, train_labels, shots=(2, 7), draws=2, seed=0)
    assert [np.bincount(labels).tolist() for _, labels in drawn] == [[2] * 4, [2] * 4, [7] * 4, [7] * 4]
    rows = [{row.tobytes() for row in features} for features, _ in drawn]
    assert rows[0] < rows[2] and rows[1] < rows[3] and rows[0] != rows[1]


def test_a_class_with_fewer_pictures_gives_all_and_is_counted():
    train, _ = clusters(20, seed=0)
    labels = np.array([0] * 12 + [1] * 5 + [2] * 2 + [3])
    results = few_shot_accuracy(train, labels, train, labels, shots=(1, 5, 50), draws=1, seed=0)
    assert [result.small_classes for result in results.values()] == [0, 2, 4]
    assert [result.spread for result in results.values()] == [0, 0, 0]


def test_draws_depend_on_the_seed_alone_and_more_of_them_keep_the_first():
    train, labels = clusters(60, seed=0, distance=0.5)

    def accuracies(**changed):
        settings = {"shots": (3,), "draws": 3, "seed": 0, **changed}
        return few_shot_accuracy(train, labels, train, labels, **settings)[3].accuracies

    before = np.random.get_state()[1].copy()
    assert accuracies() == accuracies()
    assert accuracies(draws=5)[:3] == accuracies()
    assert accuracies(seed=1) != accuracies()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": ()}, r"needs 1 shot and 1 draw or more, got \[\] shots and 2 draws"),
        ({"shots": (5, 0)}, r"got \[5, 0\] shots"),
        ({"draws": 0}, "and 0 draws"),
        ({"train_labels": np.zeros(8, int)}, "all of one class"),
        ({"train": np.full((8, 8), np.nan)}, "features of 8 pictures are not finite"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_a_sentence(change, message):
    features, labels = clusters(8, seed=0)
    arguments = {"train": features, "train_labels": labels, "test": features, "test_labels": labels}
    with pytest.raises(UserError, match=message):
        few_shot_accuracy(**{**arguments, "shots": (1,), "draws": 2, "seed": 0, **change})
