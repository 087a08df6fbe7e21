"""The benchmark of starts, on one command."""

import json

import pytest

from benchmarks.start import StartOptions, measure
from dino.runtime.options import UserError


@pytest.mark.slow
def test_it_reports_help_and_imports(tmp_path, capsys):
    report = tmp_path / "report.json"
    measure(StartOptions(commands=("dino.train",), turns=1, output=str(report)))
    rows = {row["path"]: row for row in json.loads(report.read_text())["comparisons"]}
    assert list(rows) == [
        "start, dino.train --help",
        "start, import xcit",
        "start, import dino.attention.render",
        "start, import dino.pretraining",
    ]
    for row in rows.values():
        assert len(row["theirs"]) == len(row["ours"]) == 1 and min(*row["theirs"], *row["ours"]) > 0
    assert rows["start, dino.train --help"]["target"] == pytest.approx(
        rows["start, dino.train --help"]["theirs"][0] / 1000, abs=0.005
    )
    assert rows["start, import xcit"]["target"] < 1
    assert "start, dino.train --help" in capsys.readouterr().out


def test_no_turns_are_refused():
    with pytest.raises(UserError, match="--turns must be 1 or more, got 0"):
        measure(StartOptions(turns=0))
