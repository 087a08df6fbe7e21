"""The answer that never looks: that it is the most frequent class at each place, and what it scores."""

import json

import numpy as np
import pytest

from benchmarks.segmentation_prior import PriorOptions, measure, most_frequent, score
from dino.downstream.segmentation.data import open_data
from dino.runtime.options import UserError
from tests.dino.downstream.segmentation.small_sets import halves, write_mask, write_set


@pytest.fixture
def folder(tmp_path):
    """Three training masks of four have class 0 on the left and class 2 on the right."""
    root = write_set(tmp_path)
    for number in range(4):
        write_mask(root / f"masks/train/{number}.png", halves(0, 2) if number else halves(1, 1))
        write_mask(root / f"masks/val/{number}.png", halves(0, 2) if number % 2 else halves(0, 1))
    return root


def test_it_answers_with_the_most_frequent_class_at_each_place(folder):
    data = open_data(str(folder))
    assert np.array_equal(most_frequent(data.train), halves(0, 2))


def test_it_scores_what_the_masks_say(folder, tmp_path):
    file = tmp_path / "prior.json"
    measure(PriorOptions(data_path=str(folder), output=str(file)))
    measures = json.loads(file.read_text())
    assert measures["pixel_accuracy"] == pytest.approx(75)
    assert measures["miou"] == pytest.approx((100 + 0 + 50) / 3)


def test_ignored_numbers_are_neither_counted_nor_scored(folder):
    data = open_data(str(folder), ignore=(2,))
    prior = most_frequent(data.train)
    assert np.array_equal(prior[:, :32], halves(0, 0)[:, :32])
    assert score(prior, data.val).counts_KK.sum() == (4 * 32 + 2 * 32) * 48


def test_without_data_it_says_what_is_missing():
    with pytest.raises(UserError, match="--data_path is missing"):
        measure(PriorOptions())
