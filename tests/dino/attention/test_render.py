"""Every mark against pixels computed by hand, by matplotlib, by torch or by brute force."""

from fractions import Fraction
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dino.attention.render import (
    AttentionOverlay,
    MaskOverlay,
    enlarge,
    heat,
    mass_mask,
    normalize,
    percentile_limits,
    save_png,
)
from dino.runtime.options import UserError


def picture(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8)


def random_map(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, cols), dtype=np.float32)


def test_each_map_is_scaled_by_its_own_extremes():
    maps = np.array([[[0.0, 1.0], [2.0, 4.0]], [[10.0, 10.0], [10.0, 20.0]]])
    expected = [[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]
    np.testing.assert_allclose(normalize(maps), expected)


def test_percentiles_keep_an_outlier_from_darkening_the_rest():
    weights = np.linspace(0.0, 1.0, 100).reshape(10, 10)
    weights[0, 0] = 1000.0
    scaled = normalize(weights, percentiles=(0, 98))
    assert scaled[0, 0] == 1 and scaled[5, 5] > 0.5
    assert normalize(weights)[5, 5] < 0.001


def test_fixed_limits_put_different_maps_on_one_scale():
    np.testing.assert_allclose(normalize(np.array([[1.0, 2.0, 9.0]]), limits=(0.0, 4.0)), [[0.25, 0.5, 1.0]])
    maps = np.stack([random_map(3, 4), 5 * random_map(3, 4, seed=1)])
    np.testing.assert_array_equal(normalize(maps, limits=percentile_limits(maps)), normalize(maps))


@pytest.mark.parametrize("level", [0.0, 0.3, 1 / 196, 1e-40, -2.0])
def test_a_map_without_contrast_is_zero_and_not_nan(level):
    flat = np.full((14, 14), level, np.float32)
    assert not normalize(flat).any()
    rounded = flat.copy()
    rounded[3, 4] = np.nextafter(flat[3, 4], np.float32(9))
    if level > 1e-30:
        assert not normalize(rounded).any()


def test_values_that_are_not_finite_count_as_zero():
    np.testing.assert_array_equal(normalize(np.array([[np.nan, np.inf, 2.0, -np.inf]])), [[0, 0, 1, 0]])


@pytest.mark.parametrize("size", [(16, 16), (37, 64), (225, 13), (1, 1), (10, 107)])
def test_a_plain_patch_covers_exactly_the_pixels_it_was_made_of(size):
    patch = 16
    weights = random_map(-(-size[0] // patch), -(-size[1] // patch))
    large = enlarge(weights, patch, size)
    expected = [[weights[row // patch, col // patch] for col in range(size[1])] for row in range(size[0])]
    np.testing.assert_array_equal(large, np.array(expected))


def test_smooth_is_cubic_interpolation_between_patch_centres_within_the_range_of_the_map():
    weights = random_map(3, 5)
    large = enlarge(weights, 8, (21, 37), smooth=True)
    cubic = torch.nn.functional.interpolate(torch.from_numpy(weights)[None, None], (24, 40), mode="bicubic")
    expected = cubic[0, 0, :21, :37].clamp(weights.min(), weights.max()).numpy()
    np.testing.assert_allclose(large, expected, atol=1e-5)


def test_a_map_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"37 x 64 pixels has 3 x 4 patches of 16, got a map of 2 x 4"):
        enlarge(random_map(2, 4), 16, (37, 64))


@pytest.mark.parametrize("colormap", ["inferno", "viridis", "turbo", "gray"])
def test_heat_has_the_colours_of_matplotlib(colormap):
    values = np.linspace(0, 1, 777, dtype=np.float32).reshape(7, 111)
    expected = matplotlib.colormaps[colormap](values, bytes=True)[..., :3]
    np.testing.assert_array_equal(heat(values, colormap), expected)


def test_an_unknown_colormap_is_a_users_mistake_with_the_nearest_names():
    with pytest.raises(UserError, match=r"no colormap 'infernal'; did you mean inferno"):
        AttentionOverlay(colormap="infernal")


@pytest.mark.parametrize("opacity", [0.0, 0.6, 1.0])
def test_overlay_blends_heat_over_the_picture_and_leaves_the_picture_alone(opacity):
    image, values = picture(9, 11), random_map(9, 11)
    before, values_before = image.copy(), values.copy()
    drawn = AttentionOverlay(opacity=opacity)(image, values)
    expected = opacity * heat(values).astype(float) + (1 - opacity) * before.astype(float)
    np.testing.assert_allclose(drawn, expected, atol=0.5001)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(values, values_before)
    assert not np.shares_memory(drawn, image)


def test_overlay_of_a_map_without_mass_is_the_picture_under_the_lowest_colour():
    image = picture(4, 4)
    drawn = AttentionOverlay("viridis", 0.5)(image, normalize(np.zeros((4, 4))))
    np.testing.assert_allclose(drawn, image / 2 + np.array([68, 1, 84]) / 2, atol=0.5)


def test_overlay_refuses_a_map_that_is_not_enlarged():
    with pytest.raises(ValueError, match="image has 8 x 8 pixels, what is drawn over it 2 x 2"):
        AttentionOverlay()(picture(8, 8), random_map(2, 2))


def test_mask_tints_inside_dims_outside_and_outlines_the_border():
    image = np.full((20, 20, 3), 100, np.uint8)
    mask = np.zeros((20, 20), bool)
    mask[5:20, 5:15] = True
    draw = MaskOverlay(color=(200, 0, 0), opacity=0.5, dimming=0.4, line_width=1)
    drawn = draw(image, mask)
    assert drawn[10, 10].tolist() == [150, 50, 50]
    assert drawn[2, 2].tolist() == [60, 60, 60]
    for row, col in [(5, 5), (5, 10), (10, 5), (19, 14)]:
        assert drawn[row, col].tolist() == [200, 0, 0]
    assert drawn[19, 10].tolist() == [150, 50, 50], "no outline where the picture itself ends"
    assert (image == 100).all()


@pytest.mark.parametrize(("keep_all", "colour"), [(True, [150, 50, 50]), (False, [60, 60, 60])])
def test_a_mask_of_everything_or_of_nothing_has_no_outline(keep_all, colour):
    image = np.full((6, 6, 3), 100, np.uint8)
    drawn = MaskOverlay((200, 0, 0), opacity=0.5, dimming=0.4)(image, np.full((6, 6), keep_all))
    assert (drawn == colour).all()


@pytest.mark.parametrize("keep", ["0", "0.1", "0.25", "0.3", "0.6", "0.7", "0.95", "1"])
@pytest.mark.parametrize(
    "weights", [[1, 1, 1, 1, 1, 1], [0, 5, 3, 3, 1, 0], [10, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
)
def test_mass_mask_is_the_smallest_set_that_keeps_the_mass(weights, keep):
    goal = Fraction(keep) * sum(weights)
    smallest = next(
        count
        for count in range(len(weights) + 1)
        if any(sum(chosen) >= goal for chosen in combinations(weights, count))
    )
    kept = mass_mask(np.array(weights, np.float32).reshape(2, 3), float(keep))
    assert kept.sum() == smallest
    assert sum(np.array(weights)[kept.reshape(-1)]) >= goal


def test_mass_mask_takes_the_first_of_equal_patches():
    weights = np.array([[1, 2, 2], [2, 2, 1]])
    np.testing.assert_array_equal(mass_mask(weights, 0.55), [[False, True, True], [True, False, False]])


def test_mass_mask_keeps_nothing_of_a_map_without_mass():
    assert not mass_mask(np.zeros((3, 4)), 0.6).any()
    assert not mass_mask(np.full((3, 4), np.nan), 1.0).any()


def test_mass_mask_of_many_maps_is_that_of_each():
    maps = np.random.default_rng(0).random((2, 3, 4, 5))
    expected = [[mass_mask(head, 0.6) for head in heads] for heads in maps]
    np.testing.assert_array_equal(mass_mask(maps, 0.6), expected)


def test_mass_mask_refuses_a_part_beyond_the_whole():
    with pytest.raises(ValueError, match="between 0 and 1, got 60"):
        mass_mask(np.ones((2, 2)), 60)


def test_png_holds_the_pixels(tmp_path: Path):
    image = picture(13, 7)
    save_png(image, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    save_png(picture(3, 3), path)
    before = path.read_bytes()

    def full_disk(self: Path, data: object) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_png(picture(3, 3, seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
