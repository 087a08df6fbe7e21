"""Layers on their way through a file that nobody sees."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dino.attention.layer_store import LayerStore
from dino.runtime.options import UserError
from tests.full_disk import full_disk

TIMES = [Fraction(n, 30_000) for n in (0, 1001, 2002, 9009, 9010)]


@pytest.mark.parametrize(
    "shapes", [{"mean": (3, 4)}, {"mean": (3, 4), "head1": (3, 4), "pca": (3, 4, 3)}, {"mean": (1, 1)}]
)
def test_layers_come_back_with_their_times_as_they_went_in(tmp_path: Path, shapes):
    random = np.random.default_rng(0)
    frames = [{name: random.random(shape, np.float32) for name, shape in shapes.items()} for _ in TIMES]
    with LayerStore(tmp_path) as store:
        for time, layers in zip(TIMES, frames, strict=True):
            store.append(time, layers)
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        for _ in range(2):
            for (seconds, found), time, expected in zip(store, TIMES, frames, strict=True):
                assert seconds == float(time) and found.keys() == expected.keys()
                for name, layer in expected.items():
                    np.testing.assert_array_equal(found[name], layer)


def test_what_was_never_filled_is_empty(tmp_path: Path):
    with LayerStore(tmp_path) as store:
        assert list(store) == []


@pytest.mark.parametrize("count", [1, 500])
def test_a_full_disk_is_one_sentence_whether_found_at_once_or_in_the_end(tmp_path: Path, count: int):
    sentence = rf"cannot keep the maps of all frames in {tmp_path}: File too large; make room"
    with full_disk(100), pytest.raises(UserError, match=sentence), LayerStore(tmp_path) as store:
        for index in range(count):
            store.append(Fraction(index), {"mean": np.zeros((9, 9), np.float32)})
        next(iter(store))


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path):
    with (
        pytest.raises(UserError, match=r"cannot keep the maps .*No such file"),
        LayerStore(tmp_path / "gone"),
    ):
        pytest.fail("was entered")
