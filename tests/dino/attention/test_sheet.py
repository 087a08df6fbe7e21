"""The sheet is read back: tiles are found as what is neither paper nor ink."""

import cv2
import numpy as np
import pytest

from dino.attention.render import enlarge, heat, normalize
from dino.attention.sheet import AttentionSheet, Panel, panel_sheet

TILE = 64


def maps(heads: int, rows: int = 4, cols: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((heads, rows, cols), dtype=np.float32)


def red(rows: int = 32, cols: int = 32) -> np.ndarray:
    return np.full((rows, cols, 3), (255, 0, 0), np.uint8)


def find_tiles(sheet: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(top, left, rows, cols) of every large area that is not white, in reading order."""
    drawn = (sheet != 255).any(axis=-1).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(drawn)
    boxes = [(top, left, rows, cols) for left, top, cols, rows, area in stats[1:] if area > 500]
    return sorted(boxes)


def cut(sheet: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    top, left, rows, cols = box
    return sheet[top : top + rows, left : left + cols]


def test_rows_are_pictures_and_columns_the_picture_the_mean_and_each_head():
    stacks = [maps(3, seed=seed) for seed in range(2)]
    sheet = AttentionSheet(tile=TILE)([red(), red()], stacks, patch_size=8, title="epoch 1")
    tiles = find_tiles(sheet)
    assert [box[2:] for box in tiles] == [(TILE, TILE)] * 2 * 5
    for row, stack in enumerate(stacks):
        of_row = tiles[5 * row : 5 * row + 5]
        assert len({top for top, *_ in of_row}) == 1
        assert (cut(sheet, of_row[0]) == (255, 0, 0)).all()
        for box, weights in zip(of_row[1:], [stack.mean(axis=0), *stack], strict=True):
            expected = heat(enlarge(normalize(weights, percentiles=(0, 99)), TILE // 4, (TILE, TILE)))
            np.testing.assert_array_equal(cut(sheet, box), expected)


def test_panels_are_shown_as_they_are_each_under_its_label():
    drawn = [Panel(heat(maps(1, 8, 8, seed)[0]), f"head {seed}", patches=True) for seed in range(3)]
    sheet = panel_sheet([Panel(red(), "picture"), *drawn], tile=TILE, columns=2)
    tiles = find_tiles(sheet)
    assert [box[2:] for box in tiles] == [(TILE, TILE)] * 4 and len({top for top, *_ in tiles}) == 2
    for box, panel in zip(tiles[1:], drawn, strict=True):
        np.testing.assert_array_equal(cut(sheet, box), panel.pixels.repeat(8, axis=0).repeat(8, axis=1))
    other = [Panel(panel.pixels, "head 9", patches=True) for panel in drawn]
    named = (sheet != panel_sheet([Panel(red(), "picture"), *other], tile=TILE, columns=2)).any(axis=-1)
    for top, left, _, cols in tiles[1:]:
        assert named[top - 20 : top, left : left + cols].any() and not named[top : top + TILE].any()


def test_a_spot_beside_a_label_tells_which_colour_a_head_has():
    panels = [
        Panel(red(), "head 3", (30, 144, 255)),
        Panel(red(), "head 5", (50, 205, 50)),
        Panel(red(), "mean"),
    ]
    sheet = panel_sheet(panels, tile=TILE, columns=3)
    tiles = find_tiles(panel_sheet([Panel(red(), panel.label) for panel in panels], tile=TILE, columns=3))
    for (top, left, _, cols), panel in zip(tiles, panels, strict=True):
        above = sheet[:top, left : left + cols].reshape(-1, 3).tolist()
        spots = {color: above.count(list(color)) for color in ((30, 144, 255), (50, 205, 50))}
        assert [color for color, count in spots.items() if count > 30] == (
            [panel.color] if panel.color else []
        )


def test_a_title_far_wider_than_the_panels_loses_its_middle():
    name = "a" + "x" * 250 + ".jpg"
    long, longer = (panel_sheet([Panel(red())], title=title, tile=TILE) for title in (name, name * 9))
    assert long.shape[1] < 1000 and longer.shape[1] < 1000
    short = panel_sheet([Panel(red())], title="a photo.jpg", tile=TILE)
    assert (short < 128).all(axis=-1).any() and short.shape[1] < 300


def test_one_pictures_row_can_be_broken():
    sheet = AttentionSheet(tile=TILE, columns=2)([red()], [maps(3)], patch_size=8)
    tiles = find_tiles(sheet)
    assert len({top for top, *_ in tiles}) == 3
    assert [len([box for box in tiles if box[0] == top]) for top in sorted({box[0] for box in tiles})] == [
        2,
        2,
        1,
    ]


def test_labels_stand_once_above_the_columns_and_the_title_above_them():
    draw = AttentionSheet(tile=TILE)
    pictures, stacks = [red(), red()], [maps(2), maps(2)]
    plain = draw(pictures, stacks, patch_size=8)
    titled = draw(pictures, stacks, patch_size=8, title="epoch 12 · k-NN 43.1 %")
    first, second = sorted({top for top, *_ in find_tiles(plain)})
    dark = (plain < 128).all(axis=-1)
    for _, left, _, cols in find_tiles(plain)[:4]:
        assert dark[:first, left : left + cols].any(), "a column without a label"
    assert not dark[first + TILE : second].any(), "labels are not repeated"
    assert titled.shape[0] > plain.shape[0]
    grown = titled.shape[0] - plain.shape[0]
    np.testing.assert_array_equal(titled[-first - TILE :, : plain.shape[1]], plain[-first - TILE :])
    assert (titled[: grown + 1] < 128).all(axis=-1).any()


def test_a_long_title_widens_the_sheet():
    draw = AttentionSheet(tile=TILE)
    wide = draw([red()], [maps(1)], patch_size=8, title="a long title " * 10)
    assert wide.shape[1] > draw([red()], [maps(1)], patch_size=8).shape[1]
    assert (wide[:, -10:] == 255).all()


def test_pictures_of_any_shape_keep_it_and_stay_unpainted():
    images = [red(20, 40), red(37, 21), red(300, 10)]
    stacks = [maps(1, 3, 5), maps(1, 5, 3), np.zeros((1, 38, 2))]
    sheet = AttentionSheet(tile=TILE, smooth=True, opacity=0.5)(images, stacks, patch_size=8)
    shapes = [box[2:] for box in find_tiles(sheet)]
    assert shapes[0] == (32, 64) and (64, 36) in shapes
    assert all((image == (255, 0, 0)).all() for image in images)


def test_a_picture_without_maps_is_refused():
    with pytest.raises(ValueError, match="one stack of maps per picture, got 1 for 2 pictures"):
        AttentionSheet()([red(), red()], [maps(1)], patch_size=8)
