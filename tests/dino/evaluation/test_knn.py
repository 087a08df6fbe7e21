import math
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from dino.evaluation import features, knn
from dino.evaluation.benchmark import FeatureOptions, labelled_features
from dino.evaluation.features import extract_features
from dino.evaluation.knn import knn_accuracy
from dino.runtime import distributed
from dino.runtime.options import UserError
from tests.dino.small_runs import write_pictures


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


def test_blocks_of_queries_and_of_training_rows_change_nothing(monkeypatch):
    train, train_labels = clusters(60, 5, seed=0)
    test, test_labels = clusters(50, 5, seed=1)
    whole = knn_accuracy(train, train_labels, test, test_labels, ks=(10,))[10]
    monkeypatch.setattr(knn, "_QUERIES_PER_BLOCK", 7)
    monkeypatch.setattr(knn, "_ROWS_PER_BLOCK", 11)
    blocks = knn_accuracy(train, train_labels, test, test_labels, ks=(10,))[10]
    np.testing.assert_array_equal(whole.predictions, blocks.predictions)
    assert whole.top5 == blocks.top5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (10, 0)}, "k must be 1 or more, got 10, 0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
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


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dino-knn", *map(str, arguments)])
    knn.main()


@pytest.fixture
def folder(tmp_path):
    """Two classes told apart by colour, and one broken file."""
    write_pictures(tmp_path / "train", count=6)
    write_pictures(tmp_path / "val", count=3, seed=1)
    (tmp_path / "train" / "cats" / "0.png").write_bytes(b"no picture")
    return tmp_path


SMALL = ("--arch", "xcit_pico_3_p8", "--image_size", "16", "--num_workers", "0")


def test_command_prints_dinos_lines_and_its_dumped_files_load_again(folder, monkeypatch, capsys):
    dump = folder / "features"
    on_cpu = ("--device", "cuda", "--use_cuda", "false")
    run_command(
        monkeypatch, *SMALL, *on_cpu, "--data_path", folder, "--nb_knn", 3, 50, "--dump_features", dump
    )
    output = capsys.readouterr().out
    assert "random weights: a baseline" in output
    assert "left out: " in output and "cats/0.png" in output
    assert "--nb_knn 50: there are only 11 training pictures, so all of them vote" in output
    lines = [line for line in output.splitlines() if "classifier result" in line]
    assert lines[0].startswith("3-NN classifier result: Top1: ") and ", Top5: 100.000, Balanced: " in lines[0]

    features = torch.load(dump / "trainfeat.pth", weights_only=True)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(11))
    assert torch.load(dump / "testlabels.pth", weights_only=True).tolist() == [0, 0, 0, 1, 1, 1]
    run_command(monkeypatch, "--load_features", dump, "--nb_knn", 3, 50)
    assert [line for line in capsys.readouterr().out.splitlines() if "classifier result" in line] == lines


def fails_with(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_command_names_what_is_missing(folder, monkeypatch, capsys):
    (folder / "val" / "dogs").rename(folder / "val" / "bright")
    error = fails_with(monkeypatch, capsys, *SMALL, "--data_path", folder)
    assert "val has 1 of its 2 classes without any in train: bright; both need the same" in error
    error = fails_with(monkeypatch, capsys, *SMALL, "--data_path", folder / "train")
    assert "train is one set of pictures; two are needed: a folder that holds train/ and val/" in error
    (folder / "trainfeat.pth").write_bytes(b"no tensor")
    error = fails_with(monkeypatch, capsys, "--load_features", folder)
    assert "trainfeat.pth cannot be read as a tensor; write it again with --dump_features" in error
    error = fails_with(monkeypatch, capsys, "--load_features", folder / "nowhere")
    assert "trainfeat.pth is missing; --load_features needs trainfeat.pth, trainlabels.pth" in error


def test_features_that_cannot_be_dumped_are_one_sentence(folder, monkeypatch, capsys):
    (folder / "file").write_text("mine")
    error = fails_with(monkeypatch, capsys, *SMALL, "--data_path", folder, "--dump_features", folder / "file")
    assert f"cannot write into --dump_features {folder}/file: File exists; name another folder" in error
    assert (folder / "file").read_text() == "mine"


def test_loading_and_computing_share_the_cores(folder, monkeypatch):
    threads, loading = [], []

    def extract(*arguments, num_workers, **settings):
        loading.append(num_workers)
        return extract_features(*arguments, num_workers=0, **settings)

    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(distributed, "usable_cores", lambda: 6)
    monkeypatch.setattr(features, "extract_features", extract)
    labelled_features(
        FeatureOptions(arch="xcit_pico_3_p8", image_size=16, data_path=str(folder), device="cpu")
    )
    assert (threads, loading) == ([3], [3, 3])


def test_val_may_lack_a_class_of_train(folder, monkeypatch, capsys):
    (folder / "train" / "black").mkdir()
    PIL.Image.new("RGB", (24, 24)).save(folder / "train" / "black" / "0.png")
    run_command(
        monkeypatch, *SMALL, "--data_path", folder, "--nb_knn", 3, "--dump_features", folder / "features"
    )
    # Labels count train's classes: black, cats, dogs.
    assert torch.load(folder / "features" / "testlabels.pth", weights_only=True).tolist() == [
        1,
        1,
        1,
        2,
        2,
        2,
    ]
