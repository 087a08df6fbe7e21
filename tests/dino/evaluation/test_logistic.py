import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from dino.evaluation.logistic import logistic_accuracy
from dino.runtime.options import UserError


def clusters(count, seed, classes=3, width=5):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return (centres[labels] + generator.normal(size=(count, width))).astype(np.float32), labels


def test_result_is_scikit_learns_on_standardised_features():
    train, train_labels = clusters(300, seed=0, classes=7)
    test, test_labels = clusters(80, seed=1, classes=7)
    scale = np.array([1, 100, 1e-3, 1, 1])  # a strong penalty tells channels of different scales apart
    train, test = train * scale + 7, test * scale + 7
    result = logistic_accuracy(train, train_labels, test, test_labels, grid=(1e-2,))
    mean, deviation = train.mean(0), train.std(0)
    model = LogisticRegression(C=1e-2, max_iter=500, tol=1e-6)
    model.fit((train - mean) / deviation, train_labels)
    scores = model.decision_function((test - mean) / deviation)
    assert (result.predictions == scores.argmax(axis=1)).mean() > 0.98
    assert result.top1 == pytest.approx(100 * (result.predictions == test_labels).mean())
    assert result.top5 == pytest.approx(100 * top_k_accuracy_score(test_labels, scores, k=5), abs=2.6)
    assert result.balanced == pytest.approx(100 * balanced_accuracy_score(test_labels, result.predictions))
    np.testing.assert_array_equal(result.correct, result.predictions == test_labels)


def test_c_is_chosen_without_a_look_at_the_test_set_and_shrinks_noise():
    train, train_labels = clusters(60, seed=0)
    noise = np.random.default_rng(5).normal(size=(60, 40))
    train = np.concatenate([train, noise], axis=1)
    test, test_labels = clusters(30, seed=1)
    test = np.concatenate([test, noise[:30]], axis=1)
    result = logistic_accuracy(train, train_labels, test, test_labels)
    other = logistic_accuracy(train, train_labels, -test[:5], (test_labels[:5] + 1) % 3)
    assert (result.chosen, result.held_out, result.chosen_name) == (other.chosen, other.held_out, "C")
    assert result.chosen < 100  # the weakest penalty fits the noise


def test_two_classes_and_one_picture_to_test_on_are_enough():
    train, labels = clusters(60, seed=0, classes=2)
    scale = 10 * (labels[:, None] - 0.5)
    result = logistic_accuracy(train + scale, labels, (train + scale)[:1], labels[:1])
    assert (result.top1, result.balanced, result.top5) == (100, 100, None)
    assert result.predictions.dtype == np.int64


def test_one_picture_per_class_is_enough_and_leaves_the_default_c():
    features = np.eye(6, dtype=np.float32)
    result = logistic_accuracy(features, np.arange(6) * 3, features, np.arange(6) * 3)
    assert (result.top1, result.top5, result.chosen, result.held_out, result.at_edge) == (
        100, 100, 1.0, None, False,
    )  # fmt: skip


def test_fifteen_hundred_classes_are_fitted():
    features = np.random.default_rng(0).normal(size=(1500, 12)).astype(np.float16)
    result = logistic_accuracy(features, np.arange(1500), features[:40], np.arange(40))
    assert result.top5 is not None and result.top5 >= result.top1 > 50


def test_class_unseen_in_training_is_wrong_and_a_constant_channel_does_no_harm():
    train, labels = clusters(60, seed=0, classes=6)
    train[:, 0] = 4
    result = logistic_accuracy(train, labels, train[:4], np.array([7, 7, 7, 7]))
    assert result.top1 == result.top5 == result.balanced == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": np.zeros(9, dtype=int)}, "all of one class; a linear probe needs"),
        ({"test": np.ones((9, 4), np.float32)}, "training features are 5 wide and the test features 4"),
        ({"train": np.full((9, 5), np.inf, np.float32)}, "features of 9 pictures are not finite"),
        ({"test": np.full((9, 5), np.nan, np.float32)}, "features of 9 pictures are not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(change, message):
    features, labels = clusters(9, seed=0)
    arguments = {"train": features, "train_labels": labels, "test": features, "test_labels": labels, **change}
    with pytest.raises(UserError, match=message):
        logistic_accuracy(**arguments)


def test_fits_depend_on_the_seed_alone():
    train, labels = clusters(40, seed=0)
    before = np.random.get_state()[1].copy()
    first, again = (logistic_accuracy(train, labels, train, labels, seed=3) for _ in range(2))
    assert (first.chosen, first.held_out) == (again.chosen, again.held_out)
    np.testing.assert_array_equal(first.predictions, again.predictions)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_importing_it_brings_neither_torch_nor_scikit_learn():
    code = "import sys, dino.evaluation.few_shot; assert not {'torch', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
