import numpy as np
import pytest

from dino.evaluation import splits
from dino.evaluation.splits import draw_shots, hold_out
from dino.runtime.options import UserError


def test_a_fifth_of_every_class_is_held_out_but_every_class_keeps_a_picture_to_fit():
    labels = np.random.default_rng(0).permutation([0] * 10 + [1] * 2 + [2] + [7] * 100)
    fitted, held_out = hold_out(labels, seed=0)
    assert np.bincount(labels[fitted]).tolist() == [8, 1, 1, 0, 0, 0, 0, 80]
    assert np.bincount(labels[held_out], minlength=8).tolist() == [2, 1, 0, 0, 0, 0, 0, 20]
    assert sorted([*fitted, *held_out]) == list(range(113))
    assert (np.diff(fitted) > 0).all() and (np.diff(held_out) > 0).all()


def test_nothing_is_held_out_of_classes_of_one_picture():
    fitted, held_out = hold_out(np.arange(1500), seed=0)
    assert fitted.tolist() == list(range(1500)) and len(held_out) == 0


def test_the_part_held_out_is_capped_and_stays_spread_over_the_classes(monkeypatch):
    monkeypatch.setattr(splits, "_MOST_HELD_OUT", 200)
    labels = np.repeat(np.arange(10), 1000)
    fitted, held_out = hold_out(labels, seed=0)
    assert (len(fitted), len(held_out)) == (9800, 200)
    assert len(np.intersect1d(fitted, held_out)) == 0
    assert np.bincount(labels[held_out], minlength=10).min() >= 8


def test_splits_and_draws_depend_on_the_seed_alone():
    labels = np.random.default_rng(0).integers(0, 5, 300)
    for split in (lambda seed: hold_out(labels, seed)[1], lambda seed: draw_shots(labels, 4, seed)):
        np.testing.assert_array_equal(split(3), split(3))
        assert not np.array_equal(split(3), split(4))


def test_a_draw_has_the_shots_of_every_class_and_all_of_a_class_with_fewer():
    labels = np.random.default_rng(0).permutation([0] * 50 + [3] * 2 + [4] * 9)
    for shots, expected in ((1, [1, 0, 0, 1, 1]), (5, [5, 0, 0, 2, 5]), (100, [50, 0, 0, 2, 9])):
        drawn = draw_shots(labels, shots, seed=1)
        assert np.bincount(labels[drawn]).tolist() == expected
        assert (np.diff(drawn) > 0).all()


def test_a_draw_of_one_shot_is_part_of_the_draw_of_five():
    labels = np.random.default_rng(0).integers(0, 30, 900)
    for seed in range(3):
        assert set(draw_shots(labels, 1, seed)) < set(draw_shots(labels, 5, seed))


def test_every_picture_of_a_class_is_drawn_equally_often():
    labels = np.repeat([0, 1], 5)
    times = np.bincount(np.concatenate([draw_shots(labels, 2, seed) for seed in range(1000)]))
    assert times.sum() == 4000 and np.abs(times - 400).max() < 80  # five deviations


def test_no_shots_are_refused():
    with pytest.raises(UserError, match="needs 1 picture of every class or more, got 0"):
        draw_shots(np.arange(3), 0, seed=0)


def test_the_global_random_state_is_not_touched():
    before = np.random.get_state()[1].copy()
    hold_out(np.repeat([0, 1], 9), seed=0)
    draw_shots(np.repeat([0, 1], 9), 2, seed=0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
