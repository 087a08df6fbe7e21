import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from dino.evaluation import search
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.scoring import per_class_accuracy
from dino.runtime.options import UserError


def clusters(count, classes, seed, width=6):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return (centres[labels] + generator.normal(size=(count, width))).astype(np.float32), labels


def naive(train, train_labels, test, test_labels, k, temperature, classes, exclude_self=False):
    """Top-1, top-5 and predictions by double loop."""
    first, five, predictions = 0, 0, []
    for query in range(len(test)):
        near = []
        for row in range(len(train)):
            if not (exclude_self and row == query):
                lengths = math.dist(train[row], 0 * train[row]) * math.dist(test[query], 0 * test[query])
                near.append((-float(train[row].astype(float) @ test[query].astype(float)) / lengths, row))
        votes = [0.0] * classes
        for negative_cosine, row in sorted(near)[:k]:
            votes[train_labels[row]] += math.exp(-negative_cosine / temperature)
        ranking = sorted(range(classes), key=lambda label: (-votes[label], label))
        predictions.append(ranking[0])
        first += ranking[0] == test_labels[query]
        five += test_labels[query] in ranking[: min(5, k)]
    return 100 * first / len(test), 100 * five / len(test), predictions


@pytest.mark.parametrize(("count", "classes"), [(1, 2), (7, 7), (99, 3), (100, 7), (101, 1500)])
def test_votes_equal_the_naive_double_loop(count, classes):
    train, train_labels = clusters(60, classes, seed=0)
    test, test_labels = clusters(count, classes, seed=1)
    results = knn_accuracy(train, train_labels, test, test_labels, ks=(20, 1, 3), num_classes=classes)
    assert list(results) == [20, 1, 3]
    for k, result in results.items():
        top1, top5, predictions = naive(train, train_labels, test, test_labels, k, 0.07, classes)
        assert (result.top1, result.top5) == (pytest.approx(top1), pytest.approx(top5))
        assert result.predictions.tolist() == predictions
        np.testing.assert_array_equal(result.correct, result.predictions == test_labels)
        assert result.neighbours == k


def test_features_of_an_untrained_network_which_are_nearly_equal_are_told_apart():
    train, train_labels = clusters(200, 4, seed=0)
    test, test_labels = clusters(50, 4, seed=1)
    train, test = 1 + 1e-3 * train, 1 + 1e-3 * test  # cosines of 0.999999, where float32 knows a dozen values
    result = knn_accuracy(train, train_labels, test, test_labels, ks=(10,))[10]
    assert result.predictions.tolist() == naive(train, train_labels, test, test_labels, 10, 0.07, 4)[2]
    zero = knn_accuracy(np.zeros_like(train), train_labels, test, test_labels, ks=(200,))[200]
    assert set(zero.predictions) == {np.bincount(train_labels).argmax()}


def test_temperature_decides_between_one_near_and_two_far_neighbours():
    train = np.array([[1, 0], [0.7, 0.7], [0.7, -0.7]], np.float32)
    labels, query = np.array([0, 1, 1]), np.array([[1, 0]], np.float32)
    cold, warm = (
        knn_accuracy(train, labels, query, np.array([0]), ks=(3,), temperature=temperature)[3]
        for temperature in (0.001, 10)
    )
    assert (cold.top1, warm.top1) == (100, 0)  # exp(1 / 0.001) is beyond a float


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_equals_scikit_learn():
    train, train_labels = clusters(60, 5, seed=0)
    test, test_labels = clusters(80, 5, seed=1)
    test, test_labels = test[test_labels != 2], test_labels[test_labels != 2]
    result = knn_accuracy(train, train_labels, test, test_labels, ks=(10,))[10]
    expected = 100 * balanced_accuracy_score(test_labels, result.predictions)
    assert result.balanced == pytest.approx(expected)
    assert 0 < result.balanced < 100 and result.balanced != pytest.approx(result.top1)


def test_k_above_the_training_set_means_all_of_it():
    train, train_labels = clusters(15, 3, seed=0)
    test, test_labels = clusters(9, 3, seed=1)
    results = knn_accuracy(train, train_labels, test, test_labels, ks=(10, 15, 200))
    assert [result.neighbours for result in results.values()] == [10, 15, 15]
    np.testing.assert_array_equal(results[15].predictions, results[200].predictions)


def test_top5_of_fewer_than_five_classes_is_certain_and_of_fewer_than_five_neighbours_is_top_k():
    train, train_labels = clusters(30, 4, seed=0)
    test, test_labels = clusters(20, 4, seed=1)
    results = knn_accuracy(train, train_labels, test, test_labels, ks=(1, 10))
    assert results[10].top5 == 100
    assert results[1].top5 == results[1].top1 < 100


@pytest.mark.parametrize("k", [3, 39, 100])
def test_leave_one_out_equals_the_naive_double_loop_with_duplicates(k):
    train, labels = clusters(40, 3, seed=0)
    train[10:25], labels[10:25] = train[10], 1
    result = knn_accuracy(train, labels, train, labels, ks=(k,), exclude_self=True)[k]
    top1, _, predictions = naive(train, labels, train, labels, k, 0.07, 3, exclude_self=True)
    assert result.top1 == pytest.approx(top1) and result.predictions.tolist() == predictions
    assert result.neighbours == min(k, 39)


def test_classes_with_equal_votes_are_ranked_by_number():
    train = np.ones((6, 4), np.float32)
    labels = np.array([2, 1, 2, 1, 0, 0])
    result = knn_accuracy(train, labels, train[:3], np.array([0, 1, 2]), ks=(6,))[6]
    assert result.predictions.tolist() == [0, 0, 0]
    # With two voters a third class has no votes, and of those without the lower number comes first too.
    two = knn_accuracy(train[:2], labels[:2], train[:2], np.array([3, 0]), ks=(6,), num_classes=4)[6]
    assert two.top5 == 0 and two.neighbours == 2


def test_queries_that_are_searched_again_keep_their_place(monkeypatch):
    train, train_labels = clusters(300, 5, seed=0)
    test, test_labels = clusters(50, 5, seed=1)
    known = knn_accuracy(train, train_labels, test, test_labels, ks=(10,))[10]
    certain, propose = np.arange(50) % 3 > 0, search.Search._propose
    monkeypatch.setattr(search, "_QUERIES_PER_ANSWER", 7)
    monkeypatch.setattr(search.Search, "_propose", lambda self, rows: (propose(self, rows)[0], certain[rows]))
    result = knn_accuracy(train, train_labels, test, test_labels, ks=(10,))[10]
    np.testing.assert_array_equal(result.predictions, known.predictions)
    np.testing.assert_array_equal(result.correct, known.correct)
    assert result.top5 == known.top5


def test_accuracy_of_each_class_that_occurs_by_its_number():
    correct, labels = np.array([True, False, True, True, False]), np.array([7, 2, 7, 2, 4])
    assert list(per_class_accuracy(correct, labels).items()) == [(2, 50), (4, 0), (7, 100)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (10, 0)}, "k must be 1 or more, got 10, 0"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"test": np.ones((2, 7), np.float32)}, "training features are 6 wide and the test features 7"),
        ({"test": np.full((2, 6), np.nan, np.float32)}, "the features of 2 pictures are not finite"),
        ({"test": np.ones((0, 6), np.float32)}, "pictures to train and to test on are needed, got 9 and 0"),
        ({"exclude_self": True}, "leave-one-out needs one set of 2 pictures or more, got 9 and 2"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_a_sentence(change, message):
    train, labels = clusters(9, 3, seed=0)
    arguments = {
        "train": train,
        "train_labels": labels,
        "test": train[:2],
        "test_labels": labels[:2],
        **change,
    }
    with pytest.raises(UserError, match=message):
        knn_accuracy(**arguments)
