"""Scales, sizes, colours, masks and files against hand-made ones, matplotlib, torch, Pillow and brute force."""

from fractions import Fraction
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dino.attention.render import (
    enlarge,
    enlarge_colors,
    heat,
    heat_patches,
    mass_mask,
    normalize,
    palette,
    percentile_limits,
    save_heat_png,
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


@pytest.mark.parametrize("ground", [0.0, 1e-3])
def test_a_few_patches_on_an_even_ground_are_not_hidden_by_percentiles(ground):
    weights = np.full((2, 20, 20), ground, np.float32)
    weights[0, 3, 4], weights[0, 7, 7] = 0.5, 0.25
    weights[1] = random_map(20, 20)
    scaled = normalize(weights, percentiles=(0, 99))
    np.testing.assert_allclose(scaled[0], (weights[0] - ground) / (0.5 - ground), atol=1e-6)
    np.testing.assert_array_equal(scaled[1], normalize(weights[1], percentiles=(0, 99)))


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


def test_an_unknown_colormap_is_a_users_mistake_with_the_nearest_names(tmp_path: Path):
    with pytest.raises(UserError, match=r"no colormap 'infernal'; did you mean inferno"):
        heat(random_map(2, 2), "infernal")
    with pytest.raises(UserError, match="no colormap 'infernal'"):
        save_heat_png(random_map(2, 2), 8, (16, 16), tmp_path / "a.png", colormap="infernal")
    assert not list(tmp_path.iterdir())


SIZES = [(16, 48), (37, 64), (225, 13), (1, 1), (10, 107)]


@pytest.mark.parametrize("patch", [1, 7, 16])
@pytest.mark.parametrize("size", SIZES)
def test_colouring_patches_gives_the_pixels_of_colouring_the_enlarged_map(size, patch):
    values = random_map(-(-size[0] // patch), -(-size[1] // patch))
    expected = heat(enlarge(values, patch, size), "viridis")
    np.testing.assert_array_equal(heat_patches(values, patch, size, colormap="viridis"), expected)
    backwards = values[::-1, ::-1].copy()[::-1, ::-1]
    np.testing.assert_array_equal(heat_patches(backwards, patch, size, colormap="viridis"), expected)


@pytest.mark.parametrize("size", SIZES)
def test_smooth_levels_are_within_two_of_the_interpolated_maps(size):
    values = 0.2 + 0.6 * random_map(-(-size[0] // 16), -(-size[1] // 16))
    levels = heat_patches(values, 16, size, colormap="gray", smooth=True)[..., 0].astype(int)
    expected = heat(enlarge(values, 16, size, smooth=True), "gray")[..., 0].astype(int)
    assert np.abs(levels - expected).max() <= 2
    own = heat(values, "gray")
    assert own.min() <= levels.min() and levels.max() <= own.max(), "levels that no patch has"


def test_values_beyond_the_scale_or_not_a_number_have_the_colours_of_its_ends():
    values = np.array([[np.nan, -1, 0], [2, np.inf, 1]], np.float32)
    ends = palette("inferno")[[0, -1]]
    expected = ends[[[0, 0, 0], [1, 1, 1]]].repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(heat_patches(values, 4, (8, 12)), expected)
    np.testing.assert_array_equal(heat(values), ends[[[0, 0, 0], [1, 1, 1]]])


def test_colours_of_patches_cover_their_pixels_or_blend_between_them():
    colors = picture(2, 3)
    plain = enlarge_colors(colors, 5, (8, 12))
    expected = [[colors[row // 5, col // 5] for col in range(12)] for row in range(8)]
    np.testing.assert_array_equal(plain, np.array(expected))
    smooth = enlarge_colors(colors, 5, (8, 13), smooth=True)
    assert smooth.shape == (8, 13, 3)
    np.testing.assert_array_equal(smooth[2::5, 2::5], colors)
    assert (smooth >= colors.min(axis=(0, 1))).all() and (smooth <= colors.max(axis=(0, 1))).all()


def test_what_is_enlarged_is_never_the_input_itself():
    colors, values = picture(3, 4), random_map(3, 4)
    assert not np.shares_memory(enlarge_colors(colors, 1, (3, 4)), colors)
    assert not np.shares_memory(enlarge(values, 1, (3, 4)), values)


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


@pytest.mark.parametrize("seed", range(5))
def test_mass_mask_is_what_adding_patches_one_by_one_gives(seed):
    weights = np.random.default_rng(seed).integers(0, 5, (6, 9)).astype(np.float32)
    kept, mass = np.zeros(weights.size, bool), 0.0
    for patch in sorted(range(weights.size), key=lambda patch: (-weights.flat[patch], patch)):
        if mass >= 0.6 * weights.sum():
            break
        kept[patch], mass = True, mass + float(weights.flat[patch])
    np.testing.assert_array_equal(mass_mask(weights, 0.6), kept.reshape(6, 9))


def test_mass_mask_refuses_a_part_beyond_the_whole():
    with pytest.raises(ValueError, match="between 0 and 1, got 60"):
        mass_mask(np.ones((2, 2)), 60)


def test_png_holds_the_pixels(tmp_path: Path):
    image = picture(13, 7)
    save_png(image, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)


def test_png_keeps_alpha(tmp_path: Path):
    image = np.dstack([picture(5, 4), random_map(5, 4) > 0.5]).astype(np.uint8)
    save_png(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert written.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(written), image)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_heat_png_holds_the_drawn_colours(tmp_path: Path, size: tuple[int, int], smooth: bool):
    values = random_map(-(-size[0] // 16), -(-size[1] // 16))
    save_heat_png(values, 16, size, tmp_path / "a.png", colormap="turbo", smooth=smooth)
    expected = heat_patches(values, 16, size, colormap="turbo", smooth=smooth)
    with Image.open(tmp_path / "a.png") as written:
        assert written.mode == "P"
        np.testing.assert_array_equal(np.asarray(written.convert("RGB")), expected)


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
