"""The benchmark of exact k-NN on made-up features."""

import json

import pytest

from benchmarks.knn_search import SearchOptions, measure
from dino.runtime.options import UserError


def test_it_reports_time_memory_doubt_and_both_ways_agree(tmp_path, capsys):
    report = tmp_path / "report.json"
    small = SearchOptions(train=600, queries=70, width=8, classes=4, nb_knn=(1, 10, 5000), compare=True)
    measure(SearchOptions(**{**vars(small), "output": str(report)}))
    numbers = json.loads(report.read_text())
    assert numbers["seconds"] > 0
    assert 0.01 < numbers["peak_resident_gb"] < 10
    assert numbers["of_that_feature_files_gb"] == pytest.approx(670 * 8 * 2 / 1e9)
    assert numbers["searched_again_in_float64"] == 0
    assert all(25 < numbers["top1"][k] < 100 for k in ("1", "10"))
    assert numbers["comparison"]["ks"] == [1, 10]
    assert numbers["comparison"]["same_predictions"] == 1
    assert {"date", "command", "machine", "versions"} <= numbers.keys()
    assert "600 x 70 for k = 1, 10; same predictions: 100.00%" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match="--train, --queries, --width and --classes must be 1 or more"):
        measure(SearchOptions(queries=0))
    with pytest.raises(UserError, match=r"cannot write into --output /proc/nowhere"):
        measure(SearchOptions(output="/proc/nowhere/report.json"))
