"""The benchmark of a finished run against its own random start."""

import json

import pytest

from benchmarks import learning
from benchmarks.learning import LearningOptions, compare
from dino.pretraining import pretrain
from dino.runtime.demo_pictures import DemoPictures
from dino.runtime.options import UserError
from tests.dino.small_runs import rows, tiny, write_pictures


@pytest.fixture
def data(tmp_path):
    write_pictures(tmp_path / "data" / "train", count=12)
    write_pictures(tmp_path / "data" / "val", count=6, seed=1)
    return tmp_path / "data"


def by_measure(path, run):
    return {row["measure"]: row for row in json.loads(path.read_text())["rows"] if row["run"] == run}


def test_before_and_after_are_what_the_run_itself_saw(data, tmp_path, capsys):
    run = tmp_path / "run"
    pretrain(tiny(data, run))
    report = tmp_path / "report.json"
    compare(LearningOptions(runs=(str(run), str(run)), data_path=str(data), output=str(report)))
    once, pooled = by_measure(report, str(run)), by_measure(report, "all")
    knn = once["20-NN, class token"]
    logged = rows(run)[-1]
    assert (knn["before"], knn["after"]) == pytest.approx((logged["knn_random"], logged["knn"]))
    assert knn["difference"] == pytest.approx(knn["after"] - knn["before"])
    assert pooled["20-NN, class token"]["after"] == pytest.approx(knn["after"])
    assert pooled["20-NN, class token"]["difference"] == pytest.approx(knn["difference"])
    assert "20-NN, class token" in capsys.readouterr().out


def test_attention_of_a_random_network_on_objects_is_chance(data, tmp_path, monkeypatch):
    run, report = tmp_path / "run", tmp_path / "report.json"
    pretrain(tiny(data, run, epochs=1))
    sets = DemoPictures(count=40), DemoPictures("val", count=40)
    monkeypatch.setattr(learning, "open_train_and_val", lambda path: sets)
    compare(LearningOptions(runs=(str(run),), output=str(report)))
    measures = by_measure(report, str(run))
    assert measures["attention on object, mean of heads"]["before"] == pytest.approx(1, abs=0.1)
    disc = measures["attention on object, centred disc"]
    assert disc["before"] == disc["after"] > 1


def test_a_folder_without_a_run_is_refused(data, tmp_path):
    for runs, said in ((), "--runs"), ((str(tmp_path),), "no checkpoint in"):
        with pytest.raises(UserError, match=said):
            compare(LearningOptions(runs=runs, data_path=str(data)))
    with pytest.raises(UserError, match=r"cannot write into --output /proc/nowhere"):
        compare(LearningOptions(runs=(str(tmp_path),), output="/proc/nowhere/report.json"))
