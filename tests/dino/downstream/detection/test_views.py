import numpy as np
import pytest
import torch

from dino.downstream.detection.coco import Objects
from dino.downstream.detection.views import DetectionViews, cut, mirrored, resized

HEIGHT, WIDTH = 60, 100


def scene(*boxes: tuple[int, int, int, int]) -> tuple[np.ndarray, Objects]:
    """A picture whose objects are rectangles that can be told by their colour: 50, 100, 150 ... on black."""
    boxes = boxes or ((10, 5, 40, 25), (60, 20, 90, 58))
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    masks = np.zeros((len(boxes), HEIGHT, WIDTH), np.uint8)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        picture[y0:y1, x0:x1] = 50 * (number + 1)
        masks[number, y0:y1, x0:x1] = 1
    return picture, Objects(np.array(boxes, np.float32), np.arange(len(boxes)), masks)


def check_consistent(picture: np.ndarray, objects: Objects, *, tolerance: float = 1.0) -> None:
    """Colours, masks and boxes tell the same."""
    assert picture.dtype == np.uint8 and objects.masks.dtype == np.uint8 and objects.boxes.dtype == np.float32
    assert objects.masks.shape == (len(objects.labels), *picture.shape[:2])
    for box, label, mask in zip(objects.boxes, objects.labels, objects.masks, strict=True):
        rows, cols = np.nonzero(mask)
        seen = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
        assert np.abs(box - seen).max() <= tolerance
        if (box[2:] - box[:2]).min() < 6:
            continue  # of so little the resized colours are those of its edges
        colour = 50 * (label + 1)
        agrees = np.abs(picture[mask > 0].astype(int) - colour).max(axis=1) < 25
        assert agrees.mean() > 0.8


def test_resizing_keeps_the_shape_and_the_longest_side() -> None:
    picture, objects = resized(*scene(), 120, 1000)
    assert picture.shape == (120, 200, 3)
    assert objects.boxes.tolist() == [[20, 10, 80, 50], [120, 40, 180, 116]]
    check_consistent(picture, objects)
    picture, objects = resized(*scene(), 120, 150)
    assert picture.shape == (90, 150, 3)
    assert np.allclose(objects.boxes[0], [15, 7.5, 60, 37.5])
    check_consistent(picture, objects)
    picture, objects = resized(*scene(), 21, 1000)
    assert picture.shape == (21, 35, 3)
    check_consistent(picture, objects)


def test_mirroring_twice_is_nothing_and_once_is_right() -> None:
    picture, objects = mirrored(*scene())
    assert objects.boxes.tolist() == [[60, 5, 90, 25], [10, 20, 40, 58]]
    check_consistent(picture, objects, tolerance=0)
    again, back = mirrored(picture, objects)
    assert np.array_equal(again, scene()[0])
    assert all(np.array_equal(a, b) for a, b in zip(back, scene()[1], strict=True))


def test_a_cut_crops_what_sticks_out_and_drops_what_vanishes() -> None:
    picture, objects = cut(*scene(), top=10, left=20, rows=30, cols=40)
    assert picture.shape == (30, 40, 3)
    assert objects.labels.tolist() == [0]
    assert objects.boxes.tolist() == [[0, 0, 20, 15]]
    check_consistent(picture, objects, tolerance=0)


def test_an_object_whose_box_alone_is_in_the_cut_vanishes() -> None:
    picture, objects = scene((10, 5, 40, 25))
    objects.masks[0, :, 20:] = 0
    _, left = cut(picture, objects, top=0, left=25, rows=60, cols=60)
    assert len(left.labels) == 0 and left.masks.shape == (0, 60, 60)


def test_a_seed_decides_on_the_view() -> None:
    views = DetectionViews((48, 64, 80), 200, cut_from=(50, 60), cut_sides=(30, 50))

    def of(seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        return views(*scene())[0]

    assert np.array_equal(of(1), of(1))
    assert len({of(seed).shape for seed in range(20)}) > 3


def test_all_sizes_are_drawn_and_half_of_the_views_are_cut_and_mirrored() -> None:
    torch.manual_seed(0)
    views = DetectionViews((48, 64, 80), 400, cut_share=0.0)
    shapes, flipped = [], 0
    for _ in range(60):
        picture, objects = views(*scene())
        check_consistent(picture, objects, tolerance=2)
        shapes.append(picture.shape[:2])
        first = objects.boxes[objects.labels.tolist().index(0)]
        flipped += first[0] > picture.shape[1] / 2
    assert set(shapes) == {(48, 80), (64, 107), (80, 133)}
    assert 18 < flipped < 42
    views = DetectionViews((48,), 400, cut_from=(50, 60), cut_sides=(20, 30))
    whole = sum(views(*scene())[0].shape[:2] == (48, 80) for _ in range(60))
    assert 15 < whole < 45


def test_cut_views_show_a_part_and_are_consistent() -> None:
    torch.manual_seed(0)
    views = DetectionViews((64,), 400, cut_share=1.0, cut_from=(60, 90), cut_sides=(30, 50), flip_share=0.0)
    seen = set()
    for _ in range(40):
        picture, objects = views(*scene())
        assert min(picture.shape[:2]) == 64 and max(picture.shape[:2]) <= 64 * 50 / 30 + 1
        check_consistent(picture, objects, tolerance=3)
        seen.add(tuple(objects.labels.tolist()))
    assert {(0,), (1,)} & seen


def test_a_picture_smaller_than_a_cut_is_left_whole() -> None:
    torch.manual_seed(0)
    views = DetectionViews((60,), 400, cut_share=1.0, cut_from=(60,), cut_sides=(384, 600), flip_share=0.0)
    picture, objects = views(*scene())
    assert np.array_equal(picture, scene()[0])
    assert np.array_equal(objects.boxes, scene()[1].boxes)


def test_a_picture_without_objects_stays_without() -> None:
    picture, objects = DetectionViews((64,), 200)(
        np.zeros((30, 40, 3), np.uint8),
        Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 30, 40), np.uint8)),
    )
    assert min(picture.shape[:2]) == 64 and objects.masks.shape == (0, *picture.shape[:2])


@pytest.mark.parametrize("shape", [(1, 1), (1, 90), (70, 2)])
def test_odd_pictures_are_taken(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    whole = Objects(
        np.array([[0, 0, shape[1], shape[0]]], np.float32),
        np.zeros(1, np.int64),
        np.ones((1, *shape), np.uint8),
    )
    for _ in range(5):
        picture, objects = DetectionViews((32, 48), 64, cut_from=(40,), cut_sides=(20, 30))(
            np.full((*shape, 3), 9, np.uint8), whole
        )
        assert picture.shape[2] == 3 and max(picture.shape) <= 64
        assert objects.masks.all() and len(objects.labels) == 1


def test_the_arguments_stay_as_they_were() -> None:
    torch.manual_seed(0)
    picture, objects = scene()
    for _ in range(10):
        DetectionViews((64,), 200, cut_from=(50,), cut_sides=(20, 40))(picture, objects)
    assert np.array_equal(picture, scene()[0])
    assert all(np.array_equal(a, b) for a, b in zip(objects, scene()[1], strict=True))
