import numpy as np
import pytest
from PIL import Image

from dino.downstream.class_colors import class_color
from dino.downstream.segmentation.classes import VOID, Classes
from dino.downstream.segmentation.drawing import (
    SegmentationOverlay,
    legend_entries,
    save_ids,
    with_legend,
)
from dino.runtime.options import UserError

GREY = np.full((40, 60, 3), 100, np.uint8)


def two_halves(left=0, right=1):
    places = np.full((40, 60), left)
    places[:, 30:] = right
    return places


def test_each_class_has_its_colour_over_the_picture():
    drawn = SegmentationOverlay(opacity=0.5, edge=0)(GREY, two_halves())
    for place, pixel in ((0, drawn[5, 5]), (1, drawn[5, 50])):
        assert np.allclose(pixel, (100 + np.array(class_color(place))) / 2, atol=1)


def test_void_pixels_stay_as_they_are_and_so_does_the_input():
    image, places = GREY.copy(), two_halves(VOID, 3)
    drawn = SegmentationOverlay(edge=0)(image, places)
    assert (drawn[:, :30] == 100).all()
    assert np.array_equal(image, GREY)
    assert np.array_equal(SegmentationOverlay()(image, np.full((40, 60), VOID)), GREY)


@pytest.mark.parametrize("edge", [1, 3])
def test_a_light_line_runs_between_classes(edge):
    drawn = SegmentationOverlay(edge=edge)(GREY, two_halves())
    white = (drawn == 255).all(axis=2)
    assert white.any(axis=1).all()
    assert set(np.flatnonzero(white.any(axis=0))) == set(range(29 - edge // 2, 30 + edge // 2))


def test_places_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(40, 60\)"):
        SegmentationOverlay()(GREY, np.zeros((3, 3), int))


def test_the_legend_stands_beside_the_picture_with_each_colour():
    entries = [("road", (255, 0, 0), 0.75), ("sky", (0, 0, 255), 0.25)]
    page = with_legend(GREY, entries)
    assert np.array_equal(page[:40, :60], GREY)
    assert page.shape[1] > 60
    beside = page[:, 60:].reshape(-1, 3)
    for _, color, _ in entries:
        assert (beside == color).all(axis=1).sum() > 50


def test_a_long_legend_makes_the_page_longer_and_ends_with_how_many_more():
    entries = [(f"class {number}", class_color(number), 0.001) for number in range(150)]
    page = with_legend(GREY, entries)
    assert 500 < page.shape[0] < 2000


@pytest.mark.parametrize(
    "name", ["Straße", "道路", "طريق", "\ud800", "a\nb\x00", "x" * 500, "", "🚗", "e\u0301"]
)
def test_no_name_is_too_odd_for_a_legend(name):
    page = with_legend(GREY, [(name, (255, 0, 0), 1.0)])
    assert page.shape[1] < 60 + 1000


def test_the_legend_lists_the_classes_that_are_there_the_largest_first():
    places = np.full((10, 10), 2, np.int16)
    places[:3] = 0
    places[9] = VOID
    entries = legend_entries(places, Classes((4, 5, 6), ("a", "b", "c")))
    assert [(name, share) for name, _, share in entries] == [("c", 0.6), ("a", 0.3)]
    assert [color for _, color, _ in entries] == [class_color(2), class_color(0)]
    assert legend_entries(np.full((3, 3), VOID), Classes((4,), ("a",))) == []


def test_ids_are_written_with_a_palette_of_the_classes_colours(tmp_path):
    save_ids(two_halves(), Classes((3, 200), ("a", "b")), tmp_path / "ids.png")
    with Image.open(tmp_path / "ids.png") as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), two_halves(3, 200))
        seen = np.asarray(image.convert("RGB"))
    assert tuple(seen[0, 0]) == class_color(0) and tuple(seen[0, 59]) == class_color(1)


def test_ids_beyond_a_byte_are_written_in_16_bits(tmp_path):
    save_ids(two_halves(), Classes((3, 60_000), ("a", "b")), tmp_path / "ids.png")
    with Image.open(tmp_path / "ids.png") as image:
        assert np.array_equal(np.asarray(image), two_halves(3, 60_000))


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save_ids(two_halves(), Classes.numbered(2), tmp_path / "nowhere" / "ids.png")
