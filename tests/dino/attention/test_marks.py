"""Every mark against pixels computed by hand, and at the edges: odd sizes, one patch, one pixel, no mass, NaN."""

import itertools

import cv2
import numpy as np
import pytest

from dino.attention.marks import AttentionOverlay, ContourOverlay, HeadColors, MaskOverlay, cut_out
from dino.attention.render import enlarge, heat, mass_mask, normalize
from dino.runtime.options import UserError

SIZES = [(16, 48), (37, 61), (1, 1), (3, 100), (8, 8)]


def picture(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8)


def random_maps(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def grid(size: tuple[int, int], patch: int) -> tuple[int, int]:
    return -(-size[0] // patch), -(-size[1] // patch)


def grey(rows: int, cols: int, level: int = 100) -> np.ndarray:
    return np.full((rows, cols, 3), level, np.uint8)


# Each mark with how the maps (H, R, C) of a picture become what it is called with.
MARKS = [
    (AttentionOverlay(), lambda maps: normalize(maps[0])),
    (AttentionOverlay(smooth=True), lambda maps: normalize(maps[0])),
    (MaskOverlay(), lambda maps: mass_mask(maps[0], 0.6)),
    (ContourOverlay(), lambda maps: maps[0]),
    (HeadColors(), lambda maps: maps),
    (cut_out, lambda maps: mass_mask(maps[0], 0.6)),
]


@pytest.mark.parametrize(("draw", "values_of"), MARKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [1, 8])
def test_marks_take_any_size_and_leave_their_inputs_alone(draw, values_of, size, patch):
    image, values = picture(*size), values_of(random_maps(3, *grid(size, patch)))
    kept = image.copy(), values.copy()
    drawn = draw(image, values, patch)
    assert drawn.dtype == np.uint8 and drawn.shape[:2] == size
    np.testing.assert_array_equal(image, kept[0])
    np.testing.assert_array_equal(values, kept[1])
    assert not np.shares_memory(drawn, image)
    assert drawn.flags.writeable


@pytest.mark.parametrize(("draw", "values_of"), MARKS)
def test_the_layout_in_memory_does_not_matter(draw, values_of):
    image, maps = picture(37, 61), random_maps(3, 5, 8)
    values = values_of(maps)
    turned = image.transpose(1, 0, 2).copy().transpose(1, 0, 2)[::-1][::-1]
    backwards = values[..., ::-1].copy()[..., ::-1]
    mirrored = image[:, ::-1].copy()[:, ::-1]
    expected = draw(image, values, 8)
    np.testing.assert_array_equal(draw(turned, backwards, 8), expected)
    np.testing.assert_array_equal(draw(mirrored, backwards, 8), expected)
    image.flags.writeable = False
    np.testing.assert_array_equal(draw(image, values, 8), expected)


@pytest.mark.parametrize(("draw", "values_of"), MARKS)
def test_a_map_of_another_grid_is_refused(draw, values_of):
    with pytest.raises(ValueError, match="8 x 8 pixels has 1 x 1 patches of 8, got a map of 2 x 2"):
        draw(picture(8, 8), values_of(random_maps(3, 2, 2)), 8)


@pytest.mark.parametrize("draw", [AttentionOverlay(), MaskOverlay(), cut_out])
def test_patches_are_drawn_as_all_their_pixels_would_be(draw):
    image, patches = picture(37, 61), mass_mask(random_maps(5, 8), 0.6)
    pixels = enlarge(patches, 8, (37, 61)) > 0
    np.testing.assert_array_equal(draw(image, patches, 8), draw(image, pixels, 1))


@pytest.mark.parametrize("opacity", [0.0, 0.6, 1.0])
def test_overlay_blends_heat_over_the_picture(opacity):
    image, values = picture(9, 11), random_maps(3, 3)
    drawn = AttentionOverlay("viridis", opacity)(image, values, 4)
    heated = heat(enlarge(values, 4, (9, 11)), "viridis")
    expected = opacity * heated.astype(float) + (1 - opacity) * image.astype(float)
    np.testing.assert_allclose(drawn, expected, atol=0.5001)


def test_a_smooth_overlay_has_no_steps_between_patches():
    values = np.array([[0.0, 1.0]])
    plain = AttentionOverlay("gray", 1.0)(grey(32, 64), values, 32)[..., 0].astype(int)
    smooth = AttentionOverlay("gray", 1.0, smooth=True)(grey(32, 64), values, 32)[..., 0].astype(int)
    assert np.abs(np.diff(plain)).max() == 255 and np.abs(np.diff(smooth)).max() < 16
    assert smooth[0, 0] == 0 and smooth[0, -1] == 255


def test_overlay_of_a_map_without_mass_is_the_picture_under_the_lowest_colour():
    image = picture(4, 4)
    drawn = AttentionOverlay("viridis", 0.5)(image, normalize(np.zeros((4, 4))), 1)
    np.testing.assert_allclose(drawn, image / 2 + np.array([68, 1, 84]) / 2, atol=0.5)


@pytest.mark.parametrize("mark", [AttentionOverlay, ContourOverlay])
def test_an_unknown_colormap_is_refused_before_anything_is_drawn(mark):
    with pytest.raises(UserError, match=r"no colormap 'infernal'; did you mean inferno"):
        mark(colormap="infernal")


def test_mask_tints_inside_dims_outside_and_outlines_the_border():
    image, mask = grey(20, 20), np.zeros((4, 4), bool)
    mask[1:, 1:3] = True  # rows from 5 on, columns 5 to 14
    drawn = MaskOverlay(color=(200, 0, 0), opacity=0.5, dimming=0.4, line_width=1)(image, mask, 5)
    expected = grey(20, 20, 60)
    expected[5:, 5:15] = (200, 0, 0)
    expected[6:, 6:14] = (150, 50, 50)
    np.testing.assert_array_equal(drawn, expected)  # no outline where the picture itself ends


def test_a_masks_outline_is_as_wide_as_asked_and_grows_with_the_picture():
    def width(draw: MaskOverlay, side: int) -> int:
        drawn = draw(grey(side, side), np.array([[False, True]] * 2), side // 2)
        return int((drawn == (200, 0, 0)).all(axis=-1)[side // 4].sum())

    assert [width(MaskOverlay((200, 0, 0), line_width=pixels), 64) for pixels in (0, 1, 5)] == [0, 1, 5]
    assert [width(MaskOverlay((200, 0, 0)), side) for side in (64, 960, 2700)] == [1, 2, 6]


@pytest.mark.parametrize(("keep_all", "colour"), [(True, [150, 50, 50]), (False, [60, 60, 60])])
def test_a_mask_of_everything_or_of_nothing_has_no_outline(keep_all, colour):
    drawn = MaskOverlay((200, 0, 0), opacity=0.5, dimming=0.4)(grey(6, 6), np.full((2, 2), keep_all), 3)
    assert (drawn == colour).all()


def inside_lines(drawn: np.ndarray, image: np.ndarray, patch: int, shape: tuple[int, int]) -> np.ndarray:
    """Patches (R, C) whose centres cannot be reached from the picture's corner without crossing a line."""
    free = (drawn == image).all(axis=-1).astype(np.uint8)
    _, areas = cv2.connectedComponents(free, connectivity=4)
    centres = areas[patch // 2 :: patch, patch // 2 :: patch][: shape[0], : shape[1]]
    return centres != areas[0, 0]


@pytest.mark.parametrize("level", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_contours_enclose_the_centres_of_the_patches_that_the_mask_keeps(level):
    patch, weights = 96, np.zeros((9, 12), np.float32)  # lines too thin to hide a centre
    weights[2:5, 2:6] = np.arange(3, 15).reshape(3, 4)[:, [1, 3, 0, 2]]
    weights[6:8, 8:10] = [[20, 17], [30, 25]]
    image = grey(9 * patch, 12 * patch)
    drawn = ContourOverlay((level,), line_width=1)(image, weights, patch)
    np.testing.assert_array_equal(inside_lines(drawn, image, patch, (9, 12)), mass_mask(weights, level))


def test_a_contour_leaves_out_equal_patches_that_the_mask_must_choose_among():
    weights = np.zeros((5, 8), np.float32)
    weights[2, 2], weights[2, 4:7] = 4, 2
    image = grey(120, 192)
    drawn = ContourOverlay((0.6,), line_width=1)(image, weights, 24)
    np.testing.assert_array_equal(inside_lines(drawn, image, 24, (5, 8)), weights == 4)
    np.testing.assert_array_equal(ContourOverlay((0.6,))(image, weights > 0, 24), image)


def test_each_contour_has_its_own_colour_and_smaller_sets_lie_within_larger_ones():
    rows, cols = np.mgrid[:15, :15]
    hill = np.exp(-((rows - 7) ** 2 + (cols - 7) ** 2) / 20)
    draw = ContourOverlay((0.25, 0.5, 0.75), line_width=1)
    drawn = draw(grey(120, 120), hill, 8)
    reach = []
    for level in (0.25, 0.5, 0.75):
        distance = np.abs(drawn.astype(int) - draw.color(level)).sum(axis=-1)
        assert (distance < 60).any()
        reach.append(np.abs(np.argwhere(distance < 60) - 59.5).max())
    assert reach[0] < reach[1] < reach[2]


@pytest.mark.parametrize("level", [0.0, np.nan, 0.25, 1e-30])
def test_a_map_without_an_inside_and_an_outside_gets_no_line(level):
    image = picture(40, 40)
    np.testing.assert_array_equal(ContourOverlay((0.5, 1.0))(image, np.full((1, 1), level), 40), image)
    if level in (0, np.nan):
        np.testing.assert_array_equal(ContourOverlay()(image, np.full((5, 5), level), 8), image)


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_where_heads_overlap_the_one_with_the_larger_share_colours(heads):
    maps = random_maps(heads, 4, 5) * np.arange(1, heads + 1)[:, None, None] ** 3
    draw = HeadColors(keep=0.5, opacity=1.0, dimming=1.0)
    drawn = draw(picture(30, 40), maps, 8)
    kept = mass_mask(maps, 0.5)
    for row, col in itertools.product(range(30), range(40)):
        patch = (row // 8, col // 8)
        candidates = [
            (maps[head][patch] / maps[head].sum(), head) for head in range(heads) if kept[head][patch]
        ]
        expected = draw.color(max(candidates)[1]) if candidates else (0, 0, 0)
        assert tuple(drawn[row, col]) == expected


def test_colours_of_heads_blend_and_what_no_head_keeps_is_dimmed():
    draw = HeadColors(keep=0.9, opacity=0.5, dimming=0.4)
    drawn = draw(grey(8, 24), np.array([[[1, 0, 0]], [[0, 0, 0]], [[0, np.nan, 5]]]), 8)
    np.testing.assert_allclose(drawn[0, 0], (np.array(draw.color(0)) + 100) / 2, atol=0.5)
    assert drawn[0, 12].tolist() == [60, 60, 60]
    np.testing.assert_allclose(drawn[0, 20], (np.array(draw.color(2)) + 100) / 2, atol=0.5)


def test_heads_keep_their_own_colours_among_others():
    maps = random_maps(2, 4, 5)
    some = HeadColors()(grey(32, 40), maps, 8, numbers=[7, 2])
    all_heads = np.zeros((8, 4, 5))
    all_heads[[7, 2]] = maps
    np.testing.assert_array_equal(some, HeadColors()(grey(32, 40), all_heads, 8))


def test_sixteen_heads_can_be_told_apart():
    draw = HeadColors()
    colors = np.array([[draw.color(head) for head in range(16)]], np.float32) / 255
    lab = cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)[0]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(lab, 2)) > 36
    assert draw.color(16) == draw.color(0)


def test_a_cut_out_keeps_the_pixels_and_hides_what_is_outside():
    image, mask = picture(10, 13), np.array([[True, False], [False, True]])
    cut = cut_out(image, mask, 8)
    np.testing.assert_array_equal(cut[..., :3], image)
    expected = [[255 * mask[row // 8, col // 8] for col in range(13)] for row in range(10)]
    np.testing.assert_array_equal(cut[..., 3], expected)
