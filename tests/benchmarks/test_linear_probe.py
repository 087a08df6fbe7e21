"""The benchmark of linear heads, on few features."""

import json

import numpy as np
import pytest
import torch

from benchmarks.linear_probe import ProbeOptions, clouds, measure, one_by_one
from dino.evaluation.linear_heads import Recipe, Standardise, train_heads
from dino.runtime.options import UserError

SMALL = {
    "pictures": 64,
    "width": 8,
    "classes": (3, 101),
    "rates": 2,
    "batch_size": 16,
    "steps": 4,
    "turns": 1,
}


def test_it_reports_every_size_and_precision_and_leaves_torch_as_it_was(tmp_path, capsys):
    report = tmp_path / "report.json"
    measure(ProbeOptions(**SMALL, output=str(report)))
    numbers = json.loads(report.read_text())
    assert {"date", "command", "machine", "versions"} <= numbers.keys()
    rows = {row["path"]: row for row in numbers["comparisons"]}
    assert list(rows) == [
        f"linear probe, 2 rates, 8 x {classes}, {precision}"
        for classes in (3, 101)
        for precision in ("fp32", "bf16")
    ]
    assert [row["target"] for row in rows.values()] == [2, 2, None, None]
    assert all(row["ratio"] > 0 for row in rows.values())
    assert "linear probe, 2 rates, 8 x 3, fp32" in capsys.readouterr().out
    assert torch.tensor([1e-40]).mul(1).item() > 0, "numbers below the normal ones are flushed to zero"


def test_both_ways_learn_the_same_clouds():
    torch.manual_seed(0)
    features, labels = clouds(96, 32, 3)
    standardise = Standardise(features, torch.device("cpu"))
    recipe = Recipe(3, 5, 16, torch.device("cpu"), "fp32", seed=0)
    x, y = standardise(features), torch.from_numpy(labels)
    theirs = one_by_one(x, y, (0.3, 3.0), recipe)
    ours = train_heads(
        {"x": features},
        labels,
        np.arange(len(labels)),
        standardise={"x": standardise},
        rates={"x": (0.3, 3.0)},
        recipe=recipe,
        advance=lambda: None,
    )["x"]
    predictions = ours.logits(features).argmax(dim=-1)
    for head, predicted in zip(theirs, predictions.unbind(1), strict=True):
        assert (head(x).argmax(dim=-1) == y).float().mean() > 0.9
        assert (predicted == y).float().mean() > 0.9


@pytest.mark.parametrize("wrong", [{"steps": 5}, {"classes": (0,)}, {"rates": 0}])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(UserError, match="all sizes are 1 or more, and --pictures are enough for --steps"):
        measure(ProbeOptions(**{**SMALL, **wrong}))
