"""The benchmark of large sets, on small ones."""

import json

import pytest

from benchmarks.data_scale import ScaleOptions, measure
from dino.runtime.options import UserError


@pytest.mark.slow
def test_it_reports_starts_and_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    report, work = tmp_path / "report.json", tmp_path / "work"
    measure(
        ScaleOptions(
            names=50,
            classes=7,
            members=42,
            shards=3,
            passes=2,
            epochs=6,
            pictures=5,
            workers=1,
            folder=str(work),
            output=str(report),
        )
    )
    numbers = json.loads(report.read_text())
    assert {"date", "command", "machine", "versions"} <= numbers.keys()
    folder, shards, epochs = (numbers[part] for part in ("folder", "shards", "epochs"))
    assert folder["from_index"]["characters"] == folder["torchvision_list"]["characters"]
    assert folder["from_index"]["characters"] > 50 * len(str(work))
    assert shards["pictures"] == 21
    assert len(folder["from_index"]["after_pass"]) == len(shards["from_index"]["after_pass"]) == 2
    assert list(epochs["after_epoch"]) == ["5", "6"]
    for stage in (*folder["from_index"]["after_pass"], *epochs["after_epoch"].values()):
        assert 1 < stage["worker_private_mb"] < stage["worker_resident_mb"] < 5000
    assert list(work.iterdir()) == []
    assert str(tmp_path) not in json.dumps({**numbers, "command": ""})
    assert "50 files in 7 folders; 21 pictures in shards" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(
        UserError, match="--classes must be 2 or more, and --names and --members twice as many"
    ):
        measure(ScaleOptions(names=100, classes=60))
    with pytest.raises(UserError, match="--epochs, --pictures and --workers must be 1 or more"):
        measure(ScaleOptions(workers=0))
