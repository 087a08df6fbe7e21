"""Which heads: what is asked for, what is shown of it, and whether heads that find something are told from others."""

import re
import subprocess
import sys

import numpy as np
import pytest

from dino.attention.heads import (
    HeadChoice,
    chosen_maps,
    label,
    mirror_pair,
    parse_heads,
    pick_heads,
    pick_heads_by,
)
from dino.runtime.options import UserError


def stack(heads: int = 4, rows: int = 3, cols: int = 5) -> np.ndarray:
    return np.random.default_rng(0).random((heads, rows, cols), np.float32)


@pytest.mark.parametrize(
    ("spec", "choice"),
    [
        ("all", HeadChoice((0, 1, 2, 3), mean=True, maximum=True)),
        ("mean", HeadChoice(mean=True)),
        ("max", HeadChoice(maximum=True)),
        ("3,0", HeadChoice((3, 0))),
        (" 2 , Mean,2", HeadChoice((2,), mean=True)),
        ("3,all", HeadChoice((3, 0, 1, 2), mean=True, maximum=True)),
        ("auto", HeadChoice(auto=True)),
        ("max,1,auto", HeadChoice((1,), maximum=True, auto=True)),
    ],
)
def test_words_and_numbers_are_combined_and_each_counts_once(spec: str, choice: HeadChoice):
    assert parse_heads(spec, 4) == choice


@pytest.mark.parametrize(
    ("spec", "count", "sentence"),
    [
        ("9", 8, "--heads 9: this model has heads 0 to 7"),
        ("0,8", 8, "--heads 8: this model has heads 0 to 7"),
        ("-1", 8, "--heads -1: this model has heads 0 to 7"),
        ("1", 1, "--heads 1: this model has one head, 0"),
        (
            "best",
            8,
            "--heads best: 'best' is none of all, mean, max, auto, or numbers of heads such as 0,3,5",
        ),
        ("", 8, "--heads (empty): '' is none of all, mean"),
        ("0,,1", 8, "--heads 0,,1: '' is none of all, mean"),
        ("0 3", 8, "--heads 0 3: '0 3' is none of all, mean"),
    ],
)
def test_a_mistake_gets_one_sentence(spec: str, count: int, sentence: str):
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_heads(spec, count)


def test_picked_heads_come_behind_those_asked_for():
    assert parse_heads("2,auto", 4).filled((1, 2)) == HeadChoice((2, 1))


def test_mean_and_maximum_are_of_the_numbers_or_of_all_heads():
    maps = stack()
    of_two = chosen_maps(maps, parse_heads("3,mean,max,1", 4))
    assert list(of_two) == ["mean", "max", "head3", "head1"]
    np.testing.assert_allclose(of_two["mean"], (maps[1] + maps[3]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(of_two["max"], np.maximum(maps[1], maps[3]))
    np.testing.assert_array_equal(of_two["head3"], maps[3])
    of_all = chosen_maps(maps, parse_heads("mean", 4))
    assert list(of_all) == ["mean"]
    np.testing.assert_allclose(of_all["mean"], sum(maps) / 4, rtol=1e-6)
    assert list(chosen_maps(maps[:1], parse_heads("all", 1))) == ["mean", "max", "head0"]


def test_a_head_that_is_not_finite_does_not_spoil_the_others():
    maps = stack(3)
    maps[1] = np.nan
    maps[2, 0, 0] = np.inf
    before = maps.copy()
    layers = chosen_maps(maps, parse_heads("all", 3))
    assert np.isfinite(layers["mean"]).all() and np.isfinite(layers["max"]).all()
    np.testing.assert_allclose(layers["mean"][0, 0], maps[0, 0, 0] / 3, rtol=1e-6)
    np.testing.assert_array_equal(layers["head1"], maps[1])
    np.testing.assert_array_equal(maps, before)


def test_auto_must_be_picked_before_it_is_shown():
    with pytest.raises(ValueError, match="not picked yet"):
        chosen_maps(stack(), parse_heads("auto", 4))


def test_labels_are_for_people():
    found = [label(name) for name in ("head0", "head12", "mean", "max", "pca")]
    assert found == ["head 0", "head 12", "mean", "max", "principal components"]


@pytest.mark.parametrize(("size", "whole"), [((17, 26), (16, 24)), ((16, 24), (16, 24)), ((5, 30), (5, 24))])
def test_a_mirror_pair_has_its_patches_at_the_same_places(size: tuple[int, int], whole: tuple[int, int]):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    first, second = mirror_pair(image, 8)
    np.testing.assert_array_equal(first, image[: whole[0], : whole[1]])
    np.testing.assert_array_equal(second, np.fliplr(first))


def blob(size: tuple[int, int], row: float, col: float) -> np.ndarray:
    rows, cols = np.mgrid[: size[0], : size[1]]
    return np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / 4)


def heads_of(size: tuple[int, int], row: float, col: float, random: np.random.Generator) -> np.ndarray:
    """An object finder, a place finder, noise, a few patches at random, and a hardly visible object finder."""
    spikes = np.zeros(size)
    spikes.flat[random.choice(spikes.size, 2, replace=False)] = 1
    finder = blob(size, row, col)
    place = blob(size, size[0] / 2, (size[1] - 1) / 2)
    return np.stack([finder, place, random.random(size), spikes, 1 + 1e-3 * finder])


def scenes(count: int = 12) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    maps, mirrored = [], []
    for number in range(count):
        size = (9, 12 + number % 3)
        row, col = random.uniform(0, size[0]), random.uniform(0, size[1])
        maps.append(heads_of(size, row, col, random))
        mirrored.append(heads_of(size, row, size[1] - 1 - col, random))
    return maps, mirrored


def test_the_head_that_follows_the_object_is_picked_alone():
    picked, how = pick_heads(*scenes())
    assert picked == (0,)
    assert "heads picked without labels: 0 (1.00), which on 12 pictures and their mirror" in how
    assert "not picked: 1 (0." in how and "trained" not in how


def test_as_many_heads_are_picked_as_are_good_and_no_more_than_asked_for():
    maps, mirrored = (
        [np.concatenate([each[2:], each[:1], each[:1] + 0.2, each[:1]]) for each in side] for side in scenes()
    )
    assert pick_heads(maps, mirrored, most=2)[0] == (3, 4)
    assert pick_heads(maps, mirrored)[0] == (3, 4, 5)
    assert pick_heads(maps, mirrored, most=6)[0] == (3, 4, 5)


def test_of_one_picture_the_score_is_the_correlation_with_the_mirrored_map():
    random = np.random.default_rng(0)
    first = random.random((2, 6, 7)) ** 8
    second = (first[..., ::-1] + random.random((2, 6, 7)) * [[[0.1]], [[0.5]]]) ** 2
    expected = [np.corrcoef(first[head].ravel(), second[head][:, ::-1].ravel())[0, 1] for head in (0, 1)]
    picked, how = pick_heads([first], [second])
    assert expected[0] > expected[1] and picked[0] == 0
    assert f"0 ({expected[0]:.2f})" in how and f"1 ({expected[1]:.2f})" in how and "on 1 picture and" in how


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1)])
def test_maps_without_contrast_are_picked_with_a_doubt(value: float, shape: tuple[int, int, int]):
    maps = [np.full(shape, value)] * 2
    picked, how = pick_heads(maps, maps)
    assert picked and set(picked) <= set(range(shape[0])) and "is this network trained?" in how


def test_nothing_to_pick_by_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="0 maps"):
        pick_heads([], [])


def test_heads_are_picked_by_pictures_and_what_attends_to_them():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (40, 51, 3), np.uint8) for _ in range(4)]

    def attend(image: np.ndarray) -> np.ndarray:
        assert image.shape == (40, 48, 3)
        bright = image.reshape(5, 8, 6, 8, 3).mean(axis=(1, 3, 4)) / 255
        return np.stack([random.random((5, 6)), bright**4])

    assert pick_heads_by(images, attend, 8)[0] == (1,)


def test_heads_are_chosen_without_torch():
    code = "import sys, dino.attention.heads; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
