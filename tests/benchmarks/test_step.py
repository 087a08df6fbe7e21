"""The benchmark of a train step, on a small network."""

import json

import pytest
import torch

from benchmarks.baseline import TextbookStep
from benchmarks.step import StepOptions, gradient_error, make_views, measure
from dino.plan import create_distillation
from dino.runtime.options import UserError
from dino.train_options import TrainOptions

SMALL = {"arch": "xcit_nano_12_p16", "batch": 2, "out_dim": 64}


def test_both_steps_have_the_same_gradients_with_images_that_skip_branches() -> None:
    textbook = TextbookStep("xcit_nano_12_p16", 64, 0.3)
    ours = create_distillation(
        TrainOptions(arch="xcit_nano_12_p16", out_dim=64, drop_path_rate=0.3), torch.device("cpu"), "fp32"
    )
    textbook.copy_weights(ours.student.state_dict(), ours.teacher.state_dict())
    assert gradient_error(textbook, ours, make_views(2, local_number=2)) < 1e-5


@pytest.mark.slow
def test_it_reports_three_pairs_of_precisions(tmp_path, capsys) -> None:
    file = tmp_path / "step.json"
    measure(StepOptions(**SMALL, turns=1, output=str(file)))
    rows = json.loads(file.read_text())["comparisons"]
    assert [row["target"] for row in rows] == [1.5, 2.5, 1.3]
    assert "relative error of the gradients" in rows[0]["note"]


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="must be 1 or more"):
        measure(StepOptions(batch=0))
