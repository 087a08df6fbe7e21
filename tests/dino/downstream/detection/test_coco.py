import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino.downstream.detection.coco import open_coco, run_length
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
from tests.dino.downstream.detection.small_coco import (
    HEIGHT,
    WIDTH,
    annotation,
    opened,
    rectangle,
    spoiled,
    write,
)

# What is read


def test_labels_count_from_0_in_the_order_of_the_ids_and_lead_back_to_them(tmp_path: Path) -> None:
    found = opened(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert found.category_ids == {0: 3, 1: 7}
    assert [found.read(index)[1].labels.tolist() for index in range(3)] == [[0, 1], [1], []]


def test_boxes_are_corners_and_masks_are_drawn_in_the_picture(tmp_path: Path) -> None:
    picture, objects = opened(tmp_path).read(0)
    assert picture.shape == (HEIGHT, WIDTH, 3) and picture.dtype == np.uint8
    assert objects.boxes.tolist() == [[5, 5, 20, 15], [22, 8, 38, 28]]
    expected = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    expected[0, 5:15, 5:20] = 1
    expected[1, 8:28, 22:38] = 1
    assert np.array_equal(objects.masks, expected)


def test_a_picture_without_objects_is_scored_but_not_trained_on_unless_asked(tmp_path: Path) -> None:
    assert len(opened(tmp_path)) == 3
    training = opened(tmp_path, training=True)
    assert [each["id"] for each in training.pictures] == [11, 12]
    assert training.left_out == ["pictures without objects, which are not trained on: 1"]
    kept = opened(tmp_path, training=True, keep_empty=True)
    assert len(kept) == 3 and not kept.left_out
    assert kept.read(2)[1].masks.shape == (0, HEIGHT, WIDTH)


def test_crowds_are_never_trained_on(tmp_path: Path) -> None:
    crowd = {**annotation(4, 12, 3, 0, 0, 40, 30), "iscrowd": 1}
    crowd["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    changed = spoiled(lambda each: each["annotations"].append(crowd))
    training = opened(tmp_path, changed, training=True)
    assert "crowd regions, which are not trained on: 1" in training.left_out
    assert training.object_count() == 3
    scored = opened(tmp_path, changed)
    assert len(scored.annotations[1]) == 2 and scored.object_count() == 3
    assert len(scored.read(1)[1].labels) == 1


def test_masks_may_be_run_lengths(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[3:9, 10:30] = True
    plain = [3 + 10 * HEIGHT, *([6, HEIGHT - 6] * 20)]
    for shape in (
        run_length(mask),
        {"size": [HEIGHT, WIDTH], "counts": [*plain[:-1], HEIGHT * WIDTH - sum(plain[:-1])]},
    ):
        found = opened(
            tmp_path, spoiled(lambda each, shape=shape: each["annotations"][0].update(segmentation=shape))
        )
        assert np.array_equal(found.read(0)[1].masks[0], mask)


def test_the_first_pictures_by_id_can_be_had_alone(tmp_path: Path) -> None:
    assert [each["id"] for each in opened(tmp_path, most=2).pictures] == [11, 12]
    assert [each["id"] for each in opened(tmp_path).only({12}).pictures] == [12]


def test_classes_of_a_network_decide_on_the_labels(tmp_path: Path) -> None:
    found = opened(tmp_path, classes=["bird", "dog", "cat"])
    assert found.classes == ["bird", "dog", "cat"]
    assert found.category_ids == {1: 7, 2: 3}
    assert found.read(0)[1].labels.tolist() == [2, 1]
    with pytest.raises(
        UserError, match=r"annotations.json has objects of 'cat', which is none of the network's 1 "
    ):
        opened(tmp_path, classes=["dog"])


# What is left out and said


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"image_id": 99}, "annotations of pictures that the file does not list: 1"),
        ({"category_id": 99}, "annotations of categories that the file does not list: 1"),
        ({"bbox": [1, 2, 3]}, "annotations whose box is not four numbers: 1"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotations whose box is not four numbers: 1"),
        ({"bbox": [50, 2, 3, 3]}, "objects whose box is empty or outside the picture: 1"),
        ({"bbox": [5, 5, 0, 9]}, "objects whose box is empty or outside the picture: 1"),
        ({"segmentation": []}, "objects without a mask, or with an outline of fewer than three points: 1"),
        (
            {"segmentation": [[1, 1, 5, 5]]},
            "objects without a mask, or with an outline of fewer than three points: 1",
        ),
        (
            {"segmentation": [[1, 1, 5, 5, 9]]},
            "objects without a mask, or with an outline of fewer than three points: 1",
        ),
    ],
)
def test_what_cannot_be_used_is_left_out_and_said_in_a_line(
    tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    found = opened(tmp_path, spoiled(lambda each: each["annotations"][0].update(change)))
    assert found.left_out == [line]
    assert found.read(0)[1].labels.tolist() == [1]


def test_a_box_that_sticks_out_is_clipped_for_training_and_scored_as_it_is(tmp_path: Path) -> None:
    found = opened(tmp_path, spoiled(lambda each: each["annotations"][0].update(bbox=[-5, -5, 30, 60])))
    assert found.read(0)[1].boxes[0].tolist() == [0, 0, 25, 30]
    assert found.annotations[0][0]["bbox"] == [-5, -5, 30, 60]
    assert not found.left_out


def test_of_an_outline_only_the_parts_that_enclose_nothing_go(tmp_path: Path) -> None:
    parts = [[1, 1, 2, 2], *rectangle(5, 5, 20, 15)]
    found = opened(tmp_path, spoiled(lambda each: each["annotations"][0].update(segmentation=parts)))
    assert not found.left_out
    assert found.read(0)[1].masks[0].sum() == 150


def test_missing_pictures_are_named(tmp_path: Path) -> None:
    changed = spoiled(lambda each: each["images"][0].update(file_name="gone.png"))
    found = opened(tmp_path, changed)
    assert len(found) == 2
    (line,) = found.left_out
    assert line.startswith("pictures that are not in ") and line.endswith("(gone.png): 1")


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda each: each["images"].append(each["images"][0]), "two of its image entries have the id 11"),
        (
            lambda each: each["annotations"].append(each["annotations"][0]),
            "two of its annotation entries have the id 1",
        ),
        (
            lambda each: each["categories"].append(each["categories"][0]),
            "two of its category entries have the id 7",
        ),
        (lambda each: each["categories"].append({"id": 9, "name": "dog"}), "two categories are called 'dog'"),
        (
            lambda each: each["images"][0].update(id="x"),
            "one of its image entries has the id 'x', and ids are whole numbers",
        ),
        (
            lambda each: each["images"][0].pop("height"),
            "image 11 needs a file_name, and a height and width in pixels",
        ),
        (lambda each: each.pop("categories"), "it has no such list of categories"),
        (lambda each: each.update(images=[]), "has no pictures in .*: it lists none|has no pictures in"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path, spoiled(change))
    assert "annotations.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "is not a COCO file"), ("3", "is not a COCO")]
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    pictures, file = write(tmp_path)
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        open_coco(pictures, file)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    pictures, file = write(tmp_path)
    with pytest.raises(UserError, match="no such folder of pictures"):
        open_coco(tmp_path / "nowhere", file)
    with pytest.raises(UserError, match=r"nothing.json: No such file"):
        open_coco(pictures, tmp_path / "nothing.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no pictures in .*empty: pictures that are not in"):
        open_coco(tmp_path / "empty", file)


def test_a_picture_of_another_size_than_annotated_is_refused_by_name(tmp_path: Path) -> None:
    found = opened(tmp_path, spoiled(lambda each: each["images"][0].update(height=WIDTH, width=HEIGHT)))
    with pytest.raises(BrokenImageError) as caught:
        found.picture(0)
    assert str(caught.value) == "11.png: upright it is 40 x 30 pixels, and its annotations are of 30 x 40"
    assert found.picture(1).shape == (HEIGHT, WIDTH, 3)


def test_a_turned_picture_is_upright_before_its_size_is_compared(tmp_path: Path) -> None:
    changed = spoiled(
        lambda each: each["images"][0].update(height=WIDTH, width=HEIGHT, file_name="turned.jpg")
    )
    pictures, file = write(tmp_path, changed)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(pictures / "turned.jpg", exif=exif)
    assert open_coco(pictures, file).picture(0).shape == (WIDTH, HEIGHT, 3)


def test_a_damaged_mask_is_refused_by_the_name_of_its_picture(tmp_path: Path) -> None:
    shape = {"size": [5, 5], "counts": [0, 25]}
    found = opened(tmp_path, spoiled(lambda each: each["annotations"][0].update(segmentation=shape)))
    with pytest.raises(BrokenImageError, match=r"11.png: mask 1 is damaged"):
        found.read(0)


def test_without_pycocotools_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pycocotools", "pycocotools.mask"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'dino-xcit\[detection\]'"):
        opened(tmp_path)


def test_results_are_plain_values(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:9, 3:7] = True
    assert json.loads(json.dumps(run_length(mask))) == run_length(mask)
