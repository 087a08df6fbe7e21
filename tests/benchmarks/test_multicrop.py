"""The benchmark of the views, on two pictures and small crops."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.multicrop import MulticropOptions, measure
from dino.runtime.options import UserError

SMALL = MulticropOptions(turns=1, pictures=2, global_crops_size=32, local_crops_size=16, local_crops_number=1)


def test_it_reports_both_ways_of_augmenting(tmp_path, capsys):
    before = torch.get_num_threads(), cv2.getNumThreads()
    measure(replace(SMALL, output=str(tmp_path / "report.json")))
    assert (torch.get_num_threads(), cv2.getNumThreads()) == before
    rows = json.loads((tmp_path / "report.json").read_text())["comparisons"]
    assert [(row["unit"], row["target"]) for row in rows] == [("ms", 4.0), ("ms", 8.0)]
    assert all(row["ratio"] > 0 and "pictures/s of a core" in row["note"] for row in rows)
    assert "the device's part takes" in rows[1]["note"]
    printed = capsys.readouterr().out
    assert all(row["path"] in printed for row in rows)


def test_it_takes_pictures_of_ones_own(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    (tmp_path / "cats").mkdir()
    Image.fromarray(noise).save(tmp_path / "cats" / "a.JPG", "JPEG")
    measure(replace(SMALL, data_path=str(tmp_path)))


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--pictures must be 1 or more, got 0"):
        measure(replace(SMALL, pictures=0))
    with pytest.raises(UserError, match=r"holds no .jpg or .jpeg files: name a folder that does"):
        measure(replace(SMALL, data_path=str(tmp_path)))
