"""The picture of curves is compared with pictures of logs that must look the same, or must not."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino.curves import draw_curves

LINE = (31, 95, 168)


def log(epochs: int = 6, **constant: Any) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 8.3 - 0.5 * epoch,
            "loss_over_ln_k": (8.3 - 0.5 * epoch) / 8.318,
            "train_lr": 5e-4,
            "train_wd": 0.04,
            "teacher_entropy": 8.0 - epoch,
            "kl": 0.1 * epoch,
            "feature_std": 0.03,
            "effective_rank": 20.0 + epoch,
            **({"knn": 30.0 + epoch, "knn_random": 31.0} if epoch % 2 == 0 else {}),
            **constant,
        }
        for epoch in range(epochs)
    ]


def without(rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


def draw(rows: list[dict[str, Any]], folder: Path) -> np.ndarray:
    draw_curves(rows, folder / "curves.png")
    assert [file.name for file in folder.iterdir()] == ["curves.png"]
    return np.asarray(Image.open(folder / "curves.png"))


def test_a_falling_loss_falls_in_the_picture(tmp_path: Path):
    picture = draw([{"epoch": epoch, "train_loss": 8.0 - epoch} for epoch in range(5)], tmp_path)
    rows, cols = np.nonzero((picture == LINE).all(axis=-1))
    assert rows[cols == cols.min()].mean() < rows[cols == cols.max()].mean() - 50


def test_there_is_one_panel_for_each_curve_of_the_log(tmp_path: Path):
    full = draw(log(), tmp_path).shape
    without_knn = draw(without(log(), "knn"), tmp_path).shape
    half = draw(without(log(), "knn", "kl", "feature_std", "effective_rank"), tmp_path).shape
    assert full == without_knn, "seven panels need two lines as eight do"
    assert half[0] == pytest.approx(full[0] / 2, abs=2)


@pytest.mark.parametrize("reference", ["loss_over_ln_k", "knn_random"])
def test_what_to_compare_with_is_drawn_when_it_is_known(tmp_path: Path, reference: str):
    assert (draw(log(), tmp_path) != draw(without(log(), reference), tmp_path)).any()


def test_a_continued_run_is_compared_with_the_weights_that_it_was_given(tmp_path: Path):
    given = [
        {"knn_init" if key == "knn_random" else key: value for key, value in row.items()} for row in log()
    ]
    assert (draw(given, tmp_path) != draw(without(given, "knn_init"), tmp_path)).any()
    assert (draw(given, tmp_path) != draw(log(), tmp_path)).any(), "the label says which it is"


def test_of_an_epoch_that_was_run_twice_the_last_row_counts(tmp_path: Path):
    resumed = [*log(4), {**log(3)[2], "train_loss": 99.0}, *log(6)[2:]]
    np.testing.assert_array_equal(draw(resumed, tmp_path), draw(log(), tmp_path))


def test_missing_values_and_values_that_are_not_finite_are_the_same_gap(tmp_path: Path):
    gap = log()
    del gap[2]["train_loss"], gap[2]["loss_over_ln_k"]
    expected = draw(gap, tmp_path)
    for value in (math.nan, math.inf, None):
        broken = log()
        broken[2].update(train_loss=value, loss_over_ln_k=value)
        np.testing.assert_array_equal(draw(broken, tmp_path), expected)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"epoch": 0}],
        log(1),
        [{"train_loss": 8.3}, {"train_loss": 8.2}],
        [{"epoch": 0, "train_loss": math.nan, "loss_over_ln_k": math.nan, "knn": math.nan}],
        [{"epoch": 0, "train_loss": 0.0, "loss_over_ln_k": 0.0, "train_lr": 0.0}],
        log(3, knn=55.0),
    ],
)
def test_any_log_can_be_drawn(tmp_path: Path, rows: list[dict[str, Any]]):
    assert draw(rows, tmp_path).ndim == 3


def test_pyplot_and_its_global_state_are_not_touched():
    code = "import sys, dino.curves; sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
