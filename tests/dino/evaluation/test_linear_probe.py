import json
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from dino.evaluation import linear_probe
from dino.evaluation.linear_probe import logistic_accuracy
from dino.evaluation.paired import paired_difference
from dino.runtime.options import UserError
from tests.dino.small_runs import write_pictures


def clusters(count, seed, classes=3, width=5):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return (centres[labels] + generator.normal(size=(count, width))).astype(np.float32), labels


def test_result_is_scikit_learns_on_standardised_features():
    train, train_labels = clusters(150, seed=0)
    test, test_labels = clusters(80, seed=1)
    scale = np.array([1, 100, 1e-3, 1, 1])  # a strong penalty tells channels of different scales apart
    train, test = train * scale + 7, test * scale + 7
    result = logistic_accuracy(train, train_labels, test, test_labels, grid=(1e-2,))
    mean, deviation = train.mean(0), train.std(0)
    model = LogisticRegression(C=1e-2, max_iter=500, tol=1e-6)
    model.fit((train - mean) / deviation, train_labels)
    expected = model.predict((test - mean) / deviation)
    assert (result.predictions == expected).mean() > 0.98
    assert result.top1 == pytest.approx(100 * accuracy_score(test_labels, result.predictions))
    assert result.balanced == pytest.approx(100 * balanced_accuracy_score(test_labels, result.predictions))
    np.testing.assert_array_equal(result.correct, result.predictions == test_labels)


def test_c_is_chosen_without_a_look_at_the_test_set_and_shrinks_noise():
    train, train_labels = clusters(60, seed=0)
    noise = np.random.default_rng(5).normal(size=(60, 40))
    train = np.concatenate([train, noise], axis=1)
    test, test_labels = clusters(30, seed=1)
    test = np.concatenate([test, noise[:30]], axis=1)
    chosen = logistic_accuracy(train, train_labels, test, test_labels).chosen_c
    assert chosen == logistic_accuracy(train, train_labels, test[:5], (test_labels[:5] + 1) % 3).chosen_c
    assert chosen < 100  # the weakest penalty fits the noise


def test_every_class_keeps_a_picture_to_fit_and_a_class_of_one_is_not_held_out():
    labels = np.array([0] * 10 + [1] * 2 + [2])
    fitted, held_out = linear_probe._split(labels, seed=0)
    assert np.bincount(labels[fitted]).tolist() == [8, 1, 1]
    assert np.bincount(labels[held_out], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*fitted, *held_out]) == list(range(13))


def test_one_picture_per_class_is_enough():
    features = np.eye(3, dtype=np.float32)
    result = logistic_accuracy(features, np.arange(3), features, np.arange(3))
    assert (result.top1, result.chosen_c) == (100, 1.0)


def test_class_unseen_in_training_is_wrong_and_a_constant_channel_does_no_harm():
    train, labels = clusters(30, seed=0, classes=2)
    train[:, 0] = 4
    result = logistic_accuracy(train, labels, train[:4], np.array([7, 7, 7, 7]))
    assert result.top1 == result.balanced == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_labels": np.zeros(9, dtype=int)},
            "the training pictures are all of one class; a linear probe needs",
        ),
        ({"test": np.ones((9, 4), np.float32)}, "training features are 5 wide and the test features 4"),
        ({"train": np.full((9, 5), np.inf, np.float32)}, "features of 9 pictures are not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_a_sentence(change, message):
    features, labels = clusters(9, seed=0)
    arguments = {"train": features, "train_labels": labels, "test": features, "test_labels": labels, **change}
    with pytest.raises(UserError, match=message):
        logistic_accuracy(**arguments)


def test_paired_difference_equals_the_binomial_sum_by_hand():
    a = np.array([True] * 9 + [False] * 11)
    b = np.array([True] * 2 + [False] * 17 + [True])  # a alone is right 7 times, b alone once
    difference, p_value = paired_difference(a, b)
    assert difference == pytest.approx(30)
    assert p_value == pytest.approx(2 * (1 + 8) / 2**8)  # 2 * P(at most 1 of 8)
    assert paired_difference(b, a) == (pytest.approx(-30), pytest.approx(p_value))


def test_networks_right_on_the_same_pictures_do_not_differ():
    assert paired_difference(np.array([True, False]), np.array([True, False])) == (0, 1)
    with pytest.raises(ValueError, match=r"the same pictures, got \(2,\) and \(3,\)"):
        paired_difference(np.ones(2, bool), np.ones(3, bool))


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dino-linear", *map(str, arguments)])
    linear_probe.main()


def test_command_prints_a_table_and_writes_results(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "train", count=6)
    write_pictures(tmp_path / "val", count=3, seed=1)
    small = ("--arch", "xcit_pico_3_p8", "--image_size", 16, "--device", "cpu", "--num_workers", 0)
    run_command(monkeypatch, *small, "--data_path", tmp_path, "--output_dir", tmp_path / "new" / "run")
    output = capsys.readouterr().out
    assert "logistic regression on cached features, 2 classes:" in output
    assert "random weights: a baseline (seed 0)" in output
    results = json.loads((tmp_path / "new" / "run" / "results.json").read_text())
    assert [row["features"] for row in results["results"]] == ["CLS", "CLS + patch mean"]
    assert f"CLS + patch mean {results['results'][1]['top1']:>11.2f}" in output
    assert results["protocol"] == "logistic regression on cached features"
    assert results["pictures"] == {"train": 12, "val": 6} and results["classes"] == ["cats", "dogs"]
    assert results["weights_sha256"] is None and results["options"]["arch"] == "xcit_pico_3_p8"
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["results.json"]


def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        run_command(
            monkeypatch, "--output_dir", tmp_path / "file" / "run", "--data_path", tmp_path / "nowhere"
        )
    assert stop.value.code == 2
    assert f"cannot write into --output_dir {tmp_path}/file/run: Not a directory" in capsys.readouterr().err
