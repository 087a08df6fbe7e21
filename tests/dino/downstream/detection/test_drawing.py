import numpy as np
import pytest

from dino.downstream.class_colors import class_color
from dino.downstream.detection.drawing import ObjectsOverlay

GREY = np.full((200, 300, 3), 120, np.uint8)
BOXES = np.array([[50.0, 60.0, 150.0, 160.0]], np.float32)


def mask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    inside = np.zeros(GREY.shape[:2], bool)
    inside[y0:y1, x0:x1] = True
    return inside


def draw(*args: object, **look: object) -> np.ndarray:
    return ObjectsOverlay(**look)(GREY, *args)


def test_a_box_is_a_line_of_the_classs_colour_along_its_edge() -> None:
    drawn = draw(BOXES, [3], ["cat"], [0.9], line_width=1, text_size=0)
    color = class_color(3)
    assert tuple(drawn[110, 50]) == color and tuple(drawn[110, 149]) == color
    assert tuple(drawn[60, 100]) == color and tuple(drawn[159, 100]) == color
    assert (drawn[64:156, 54:146] == 120).all() and (drawn[:57] == 120).all()


def test_a_mask_is_a_tint_of_just_its_pixels() -> None:
    drawn = draw(BOXES, [3], ["cat"], [0.9], [mask(80, 80, 100, 120)], opacity=0.5, text_size=0)
    expected = np.round(0.5 * 120 + 0.5 * np.array(class_color(3)))
    assert np.abs(drawn[80:120, 80:100] - expected).max() <= 1
    assert (drawn[80:120, 102:140] == 120).all()


def test_the_picture_is_unchanged_and_a_new_one_is_returned() -> None:
    before = GREY.copy()
    drawn = draw(BOXES, [0], ["cat"], [0.9], [mask(60, 70, 80, 90)])
    assert np.array_equal(GREY, before)
    assert drawn.shape == GREY.shape and drawn.dtype == np.uint8 and not np.shares_memory(drawn, GREY)
    read_only = GREY.copy()
    read_only.flags.writeable = False
    ObjectsOverlay()(read_only, BOXES, [0], ["cat"], [0.9])


def test_nothing_found_is_the_picture_itself() -> None:
    assert np.array_equal(draw(np.zeros((0, 4)), [], [], []), GREY)


def relative_luminance(color: np.ndarray) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    linear = [
        value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in color / 255
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("label", range(0, 80, 3))
def test_text_is_readable_on_the_plate_of_every_class(label: int) -> None:
    drawn = draw(BOXES, [label], ["■■■"], [1.0], text_size=20, line_width=1)
    plate = drawn[30:59, 52:120].reshape(-1, 3).astype(float)
    shades = sorted(relative_luminance(each) for each in np.unique(plate, axis=0))
    assert (shades[-1] + 0.05) / (shades[0] + 0.05) > 4.5


@pytest.mark.parametrize(
    "name", ["", "наука", "犬と猫", "🐶", "a\nb\x00\u2028", "\ud83d", "i" * 500, "naïve café"]
)
def test_any_name_is_drawn_without_an_error(name: str) -> None:
    assert (draw(BOXES, [1], [name], [0.5]) != GREY).any()


@pytest.mark.parametrize(
    "box", [[-50, -50, 20, 20], [280, 190, 400, 300], [0, 0, 300, 200], [10, 10, 10, 10], [-9, -9, -5, -5]]
)
def test_captions_stay_within_the_picture(box: list[float]) -> None:
    drawn = draw(np.array([box], np.float32), [2], ["bicycle"], [0.75], line_width=1)
    with_text = np.abs(
        drawn.astype(int)
        - draw(np.array([box], np.float32), [2], ["bicycle"], [0.75], text_size=0, line_width=1)
    ).any(axis=2)
    rows, cols = np.nonzero(with_text)
    assert np.ptp(rows) > 8 and np.ptp(cols) > 50  # all of it, and not a cut part


@pytest.mark.parametrize("shape", [(1, 1), (10, 400), (3, 900)])
def test_pictures_of_any_size_are_taken(shape: tuple[int, int]) -> None:
    picture = np.zeros((*shape, 3), np.uint8)
    boxes = np.array([[0, 0, shape[1], shape[0]]], np.float32)
    assert ObjectsOverlay()(picture, boxes, [0], ["cat"], [0.5], [np.ones(shape, bool)]).shape == (*shape, 3)


def test_lines_and_letters_grow_with_the_picture() -> None:
    def marked(scale: int) -> float:
        picture = np.full((200 * scale, 300 * scale, 3), 120, np.uint8)
        drawn = ObjectsOverlay()(picture, BOXES * scale, [3], ["cat"], [0.9])
        return float((drawn != 120).any(axis=2).mean())

    assert marked(8) == pytest.approx(marked(4), rel=0.3)
