"""The benchmark for a GPU, small and on a CPU: that all of its parts work, and keep to their time."""

import json
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.comparison import Comparison
from benchmarks.gpu import GpuOptions, in_time, measure
from benchmarks.gpu_pretraining import covered, write_jpegs
from benchmarks.gpu_steps import Ways
from dino.runtime.options import UserError
from dino.runtime.pictures import open_pictures

SMALL = {
    "device": "cpu",
    "turns": 1,
    "arch_16": "xcit_nano_12_p16",
    "arch_8": "xcit_nano_12_p8",
    "out_dim": 64,
    "sizes": (32, 16),
    "local_crops_number": 2,
    "batches": (1, 2),
    "modes": (),
    "batch_size": 2,
    "steps": 4,
    "settled": 1,
    "num_workers": 0,
    "video_size": (48, 64),
    "video_seconds": 1,
    "knn_sizes": (600, 70),
    "compile": "false",
}


def row(number):
    return Comparison(f"row {number}", "ms", [2.0], [1.0], peer="nobody")


def two_rows_and_a_sleep(options):
    yield row(0)
    yield row(1)
    time.sleep(600)


def a_row_and_a_failure(options):
    yield row(0)
    raise ValueError("broken in its middle")


@pytest.mark.slow
def test_all_parts_report_a_row(tmp_path, capfd):
    path = tmp_path / "gpu.json"
    measure(GpuOptions(**SMALL, parts=("steps_16", "pretraining", "video", "knn"), output=str(path)))
    rows = {each["path"]: each for each in json.loads(path.read_text())["comparisons"]}
    assert list(rows) == [
        "train step, xcit_nano_12_p16, largest batch",
        "train step, xcit_nano_12_p16, largest batch, patch embedding channels-last",
        "pre-training, xcit_nano_12_p16, real JPEGs, per 1000 pictures",
        "attention video, xcit_nano_12_p8, 48 rows, per frame",
        "k-NN, 600 x 70, k = 10, 20, 100, 200",
    ]
    assert all(each["ratio"] > 0 for each in rows.values())
    assert "accuracies differ by 0.00 points" in rows["k-NN, 600 x 70, k = 10, 20, 100, 200"]["note"]
    assert "2 pictures, " in capfd.readouterr().out


@pytest.mark.slow
def test_a_part_ends_when_its_time_is_over_and_keeps_what_it_has(capsys):
    began = time.monotonic()
    rows = list(in_time("sleeping", two_rows_and_a_sleep, GpuOptions(), 20))
    assert [each.path for each in rows] == ["row 0", "row 1"]
    assert time.monotonic() - began < 300
    assert "sleeping: its 20 s are over" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_that_fails_is_told_and_those_after_it_run(capfd, monkeypatch):
    monkeypatch.setattr(
        gpu, "PARTS", {"first": (a_row_and_a_failure, 1.0), "second": (a_row_and_a_failure, 1.0)}
    )
    rows = list(gpu.comparisons(GpuOptions(parts=("first", "second"))))
    assert [each.path for each in rows] == ["row 0", "row 0"]
    told = capfd.readouterr()
    assert "first: failed, see above" in told.out and "second: failed, see above" in told.out
    assert told.err.count("ValueError: broken in its middle") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="torch sees no CUDA device here"):
        measure(GpuOptions())


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match="unknown part stairs in --parts; known: steps_16, pretraining, "):
        measure(GpuOptions(device="cpu", parts=("stairs",)))


def test_idle_time_is_what_no_kernel_covers():
    assert covered([(0, 2), (1, 3), (1, 2), (6, 8)]) == 5 / 8
    assert covered([(5, 9), (6, 7)]) == 1


def test_the_arithmetic_of_a_step_is_counted_without_computing_it():
    few, many = (Ways("xcit_nano_12_p16", 16, [32] * count, torch.device("cpu")).flops() for count in (2, 4))
    wide = Ways("xcit_nano_12_p16", 1016, [32] * 2, torch.device("cpu")).flops()
    # Two views more for the student alone, whose gradients take twice its forward pass, bar that to the pictures.
    assert many / few == pytest.approx(1 + 3 / 4, rel=0.05)
    # 256 channels to 1000 prototypes more: forward and backward of two views, forward of the teacher's two.
    assert wide - few == pytest.approx(2 * 256 * 1000 * (2 * 3 + 2))


def test_pictures_that_are_made_are_as_many_as_asked_for(tmp_path):
    write_jpegs(tmp_path / "pictures", 3)
    pictures = open_pictures(str(tmp_path / "pictures"))
    assert len(pictures) == 3
    assert {pictures.picture(index).size for index in range(3)} == {(500, 375)}
