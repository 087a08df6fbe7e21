"""What all benchmarks share: turns, ratios, memory, report."""

import importlib
import json
import os
from typing import get_type_hints

import numpy as np
import pytest

from benchmarks import comparison
from benchmarks.bench import BENCHMARKS, BenchOptions, measure
from benchmarks.comparison import (
    Comparison,
    ComparisonOptions,
    check,
    in_turns,
    isolated,
    peak_megabytes,
    report,
)
from dino.runtime.options import UserError


def test_ratio_is_of_medians_and_spread_of_single_turns():
    found = Comparison("path", "ms", theirs=[10, 30, 20], ours=[5, 10, 4], peer="theirs", target=5)
    assert found.ratio == 20 / 5
    assert found.spread == (2, 5)
    assert found.line().endswith("target 5: missed")


def test_turns_alternate_after_one_that_does_not_count(monkeypatch):
    calls, clock = [], {"theirs": 2.0, "ours": 1.0}
    monkeypatch.setattr(comparison, "milliseconds", lambda run, device: run())
    ways = [lambda name=name: calls.append(name) or clock[name] for name in clock]
    theirs, ours = in_turns(*ways, turns=3)
    assert calls == ["theirs", "ours"] * 4
    assert (theirs, ours) == ([2.0] * 3, [1.0] * 3)


def test_a_small_ratio_is_measured_again(monkeypatch):
    monkeypatch.setattr(comparison, "milliseconds", lambda run, device: run())
    theirs, ours = in_turns(lambda: 1.1, lambda: 1.0, turns=3)
    assert len(theirs) == len(ours) == 6


def _peak_of(megabytes: int) -> float:
    before = peak_megabytes()
    filled = np.ones(megabytes * 1_000_000, np.uint8)
    return peak_megabytes() - before if filled.any() else 0.0


def test_memory_is_that_of_a_fresh_process():
    of_parent = np.ones(300_000_000, np.uint8)
    assert isolated(os.getpid) != os.getpid()
    assert isolated(_peak_of, 200) == pytest.approx(200, abs=30)
    assert of_parent.all()


def test_the_report_holds_what_was_measured_and_on_what(tmp_path, capsys):
    file = tmp_path / "report.json"
    options = ComparisonOptions(output=str(file))
    report([Comparison("a path", "ms", [4.0], [2.0], peer="theirs")], options)
    written = json.loads(file.read_text())
    assert written["comparisons"][0]["ratio"] == 2
    assert {"machine", "date", "command", "versions"} <= written.keys()
    printed = capsys.readouterr().out
    assert "a path" in printed and "fp32" in printed and written["machine"] in printed
    assert f"torch {written['versions']['torch']}" in printed


@pytest.mark.parametrize(
    "options", [ComparisonOptions(turns=0), ComparisonOptions(output="/proc/none/file.json")]
)
def test_what_cannot_be_measured_or_written_is_refused_first(options):
    with pytest.raises(UserError):
        check(options)


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="unknown benchmark speed in --only; known: step, update"):
        measure(BenchOptions(only=("speed",)))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_of_the_table_takes_the_common_options(name):
    kind = get_type_hints(importlib.import_module(f"benchmarks.{name}").comparisons)["options"]
    assert issubclass(kind, ComparisonOptions)
    assert kind(turns=2, device="cpu").turns == 2
