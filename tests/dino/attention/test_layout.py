"""Panels are found again by their colour."""

import numpy as np
import pytest

from dino.attention.layout import Layout


def panel(value: int, rows: int = 72, cols: int = 128) -> np.ndarray:
    return np.full((rows, cols, 3), (value, 255 - value, 200), np.uint8)


def box(whole: np.ndarray, value: int) -> tuple[int, int, int, int]:
    """(top, left, rows, cols) of the panel of that value."""
    rows, cols = np.nonzero((whole == panel(value, 1, 1)).all(axis=-1))
    return rows.min(), cols.min(), rows.max() - rows.min() + 1, cols.max() - cols.min() + 1


def test_one_panel_without_a_label_is_the_panel():
    arrange = Layout([""], (37, 51))
    assert arrange.size == (37, 51)
    np.testing.assert_array_equal(arrange([panel(7, 37, 51)]), panel(7, 37, 51))


def test_two_columns_stand_side_by_side_at_full_size():
    arrange = Layout(["", ""], (72, 128), columns=2)
    whole = arrange([panel(10), panel(20)])
    assert whole.shape[:2] == arrange.size
    first, second = box(whole, 10), box(whole, 20)
    assert first == (0, 0, 72, 128) and second[2:] == (72, 128)
    assert second[0] == 0 and second[1] == arrange.size[1] - 128 > 128


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 18])
@pytest.mark.parametrize("size", [(72, 128), (128, 72), (10, 1072)])
def test_all_panels_of_a_grid_are_whole_and_apart(count: int, size: tuple[int, int]):
    labels = [f"head {index}" for index in range(count)]
    arrange = Layout(labels, size)
    whole = arrange([panel(10 * index + 5, *size) for index in range(count)])
    assert whole.shape[:2] == arrange.size
    for index in range(count):
        assert box(whole, 10 * index + 5)[2:] == size


def test_a_grid_of_screen_shaped_panels_is_screen_shaped():
    rows, cols = Layout(["x"] * 9, (720, 1280)).size
    assert 1.5 < cols / rows < 1.9


@pytest.mark.parametrize("longest", [64, 333, 1920])
def test_the_longest_side_is_kept_to_and_never_enlarged_to(longest: int):
    rows, cols = Layout(["x"] * 10, (720, 1280), longest=longest).size
    assert max(rows, cols) <= longest
    assert max(rows, cols) > 0.9 * longest
    assert Layout([""], (20, 30), longest=longest).size == (20, 30)


def test_labels_are_written_above_their_panels():
    arrange, bare = Layout(["mean", ""], (72, 128), columns=1), Layout(["", ""], (72, 128), columns=1)
    whole = arrange([panel(10), panel(20)])
    top = box(whole, 10)[0]
    assert top > 0 and whole[:top].max() > 200
    between = whole[top + 72 : box(whole, 20)[0]]
    assert between.max() < 50, "the second has no label"
    assert arrange.size[0] > bare.size[0]


def test_panels_are_not_painted_on_and_their_number_is_checked():
    arrange = Layout(["a", "b"], (72, 128))
    panels = [panel(10), panel(20)]
    arrange(panels)[:] = 0
    np.testing.assert_array_equal(panels[0], panel(10))
    with pytest.raises(ValueError, match="2 panels, got 1"):
        arrange(panels[:1])
