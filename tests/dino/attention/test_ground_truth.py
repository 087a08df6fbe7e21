"""Masks from files, each compared with the array or the annotation that it was made of."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.attention.ground_truth import MaskedPictures, Objects, check_same_shape, open_masks
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError

NUMBERS = np.array([[0, 1, 1, 255], [0, 7, 7, 255], [0, 0, 7, 0]], np.uint8)


def save(folder: Path, name: str, pixels: np.ndarray, mode: str = "") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)
    return path


def picture(folder: Path, name: str, rows: int = 3, cols: int = 4) -> Path:
    return save(folder, name, np.full((rows, cols, 3), 100, np.uint8))


def one_mask(tmp_path: Path, pixels: np.ndarray, mode: str = "", void: int = 255) -> Objects:
    picture(tmp_path / "images", "a.jpg")
    save(tmp_path / "masks", "a.png", pixels, mode)
    (only,) = open_masks(tmp_path / "images", tmp_path / "masks", void=void).pictures
    return only.read()


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_pixel_is_the_number_of_its_object_and_255_is_nobodys(tmp_path: Path, mode: str):
    objects = one_mask(tmp_path, NUMBERS, mode)
    assert list(objects.masks) == ["1", "7"]
    for name, mask in objects.masks.items():
        np.testing.assert_array_equal(mask, int(name) == NUMBERS)
    np.testing.assert_array_equal(objects.void, NUMBERS == 255)
    np.testing.assert_array_equal(objects.union().masks["all"], (NUMBERS == 1) | (NUMBERS == 7))


def test_another_number_can_be_the_void_or_none(tmp_path: Path):
    objects = one_mask(tmp_path, NUMBERS, void=7)
    assert list(objects.masks) == ["1", "255"] and (objects.void == (NUMBERS == 7)).all()
    objects = one_mask(tmp_path, NUMBERS, void=-1)
    assert list(objects.masks) == ["1", "7", "255"] and not objects.void.any()


def test_numbers_of_16_bits_stay_whole(tmp_path: Path):
    wide = NUMBERS.astype(np.uint16)
    wide[wide == 7] = 26001
    assert list(one_mask(tmp_path, wide).masks) == ["1", "26001"]


@pytest.mark.parametrize("stored", [np.uint8, np.bool_])
def test_a_white_object_on_black_is_an_object(tmp_path: Path, stored: type):
    plain = NUMBERS == 7
    pixels = plain if stored is np.bool_ else plain.astype(np.uint8) * 255
    objects = one_mask(tmp_path, pixels)
    (mask,) = objects.masks.values()
    np.testing.assert_array_equal(mask, plain)
    assert not objects.void.any()


def test_a_mask_without_objects_has_none(tmp_path: Path):
    objects = one_mask(tmp_path, np.zeros((3, 4), np.uint8))
    assert objects.masks == {} and objects.union().masks == {}


def test_a_mask_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(BrokenImageError, match=r"a\.png: a mask holds numbers, .* this one RGB colours"):
        one_mask(tmp_path, np.zeros((3, 4, 3), np.uint8))
    (tmp_path / "masks" / "a.png").write_bytes(b"no picture")
    (only,) = open_masks(tmp_path / "images", tmp_path / "masks").pictures
    with pytest.raises(BrokenImageError, match=r"masks/a\.png: not a picture that Pillow can read"):
        only.read()


def test_files_are_matched_by_their_path_and_the_others_counted(tmp_path: Path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for name in ("x/a.jpg", "y/a.png", "b.JPG", "c.jpg", "notes.txt"):
        picture(images, name) if name != "notes.txt" else (images / name).write_text("")
    for name in ("x/a.png", "y/a.tif", "b.png", "z/a.png", "c.jpg"):
        save(masks, name, NUMBERS)
    found = open_masks(images, masks)
    assert [each.name for each in found.pictures] == ["b.JPG", "x/a.jpg", "y/a.png"]
    assert found.pictures[1].path == images / "x" / "a.jpg"
    assert found.left_out == ["1 pictures have no mask (c.jpg)", "1 masks have no picture (z/a.png)"]


@pytest.mark.parametrize(
    ("images", "masks", "sentence"),
    [
        ("nowhere", "masks", "--images nowhere: no such folder"),
        (
            "images",
            "nowhere",
            "--masks nowhere: neither a folder of mask files nor a COCO file that ends in .js",
        ),
        ("images", "images", "are the same folder"),
        (
            "images",
            "masks",
            "no picture of --images images has a mask in --masks masks: 4 pictures have no mask",
        ),
        ("empty", "empty2", "no picture of --images empty has a mask in --masks empty2: there are none"),
        ("images", "gone.json", "--masks gone.json: No such file"),
        ("images", "text.json", "--masks text.json is not a COCO file"),
        ("images", "other.json", "--masks other.json is not a COCO file"),
        (
            "images",
            "list.json",
            "no picture of --images images has a mask in --masks list.json: there are none",
        ),
        ("images", "away.json", "1 annotated pictures are not there (gone.jpg)"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, monkeypatch, images: str, masks: str, sentence: str):
    monkeypatch.chdir(tmp_path)
    if masks.endswith(".json"):
        pytest.importorskip("pycocotools")
    for name in "abcd":
        picture(Path("images"), f"{name}.jpg")
    save(Path("masks"), "other.png", NUMBERS)
    Path("empty").mkdir()
    Path("empty2").mkdir()
    Path("text.json").write_text("no JSON")
    Path("other.json").write_text('{"images": [{"id": 1}]}')
    Path("list.json").write_text("[]")
    Path("away.json").write_text('{"images": [{"id": 1, "file_name": "gone.jpg"}], "annotations": []}')
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_masks(Path(images), Path(masks))


def rectangle(top: int, left: int, bottom: int, right: int) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def coco(tmp_path: Path, annotations: list[dict]) -> MaskedPictures:
    pytest.importorskip("pycocotools")
    images = tmp_path / "images"
    picture(images, "b.jpg", 10, 12)
    picture(images, "a.jpg", 10, 12)
    content = {
        "images": [
            {"id": number, "file_name": name, "height": 10, "width": 12}
            for number, name in ((5, "b.jpg"), (6, "a.jpg"), (7, "gone.jpg"))
        ],
        "annotations": [{"id": number, "image_id": 5, **each} for number, each in enumerate(annotations, 1)],
        "categories": [{"id": 3, "name": "cat"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return open_masks(images, tmp_path / "instances.json")


def test_coco_outlines_are_objects_and_crowds_are_not_judged(tmp_path: Path, capsys):
    crowd = np.zeros((10, 12), bool)
    crowd[6:, :4] = True
    crowd[2:5, 3:7] = True
    runs = np.flatnonzero(np.diff(np.concatenate([[0], crowd.T.ravel(), [0]]))).tolist()
    counts = np.diff([0, *runs, crowd.size]).tolist()
    found = coco(
        tmp_path,
        [
            {"category_id": 3, "segmentation": [rectangle(2, 3, 5, 7)], "iscrowd": 0},
            {"category_id": 9, "segmentation": [rectangle(0, 8, 2, 12), rectangle(7, 8, 9, 10)]},
            {"category_id": 3, "segmentation": {"size": [10, 12], "counts": counts}, "iscrowd": 1},
            {"category_id": 3, "bbox": [0, 0, 2, 2]},
        ],
    )
    assert [each.name for each in found.pictures] == ["a.jpg", "b.jpg"]
    assert found.left_out == ["1 annotated pictures are not there (gone.jpg)"]
    assert found.pictures[0].read().masks == {}
    objects = found.pictures[1].read()
    cat = np.zeros((10, 12), bool)
    cat[2:5, 3:7] = True
    other = np.zeros((10, 12), bool)
    other[:2, 8:12] = other[7:9, 8:10] = True
    assert list(objects.masks) == ["cat 1", "object 2"]
    np.testing.assert_array_equal(objects.masks["cat 1"], cat)
    np.testing.assert_array_equal(objects.masks["object 2"], other)
    np.testing.assert_array_equal(objects.void, crowd & ~cat)
    assert capsys.readouterr().out == ""


def test_a_damaged_annotation_is_named(tmp_path: Path):
    found = coco(tmp_path, [{"category_id": 3, "segmentation": [[1.0, "x"]]}])
    with pytest.raises(BrokenImageError, match=r"b\.jpg: its annotations are damaged"):
        found.pictures[1].read()


def test_without_pycocotools_a_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch):
    (tmp_path / "instances.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        open_masks(tmp_path, tmp_path / "instances.json")


def test_a_mask_may_have_another_resolution_but_not_another_shape():
    for mask in ((480, 640), (240, 320), (121, 160), (960, 1279)):
        check_same_shape(mask, (480, 640), "a.jpg")
    with pytest.raises(
        BrokenImageError, match=r"a\.jpg: the mask is 480 x 640 pixels, the upright picture 640 x 480"
    ):
        check_same_shape((640, 480), (480, 640), "a.jpg")
    with pytest.raises(BrokenImageError):
        check_same_shape((480, 480), (480, 640), "a.jpg")


def test_the_objects_of_real_pictures_are_those_of_their_annotations(shared_data: Path):
    pytest.importorskip("pycocotools")
    folder = shared_data / "coco-small"
    found = open_masks(folder / "images", folder / "annotations_val.json")
    content = json.loads((folder / "annotations_val.json").read_text())
    assert len(found.pictures) == len(content["images"]) == 100
    numbers = {image["file_name"]: image["id"] for image in content["images"]}
    for each in found.pictures[:10]:
        objects = each.read()
        areas = {
            str(note["id"]): note["area"]
            for note in content["annotations"]
            if note["image_id"] == numbers[each.name] and not note["iscrowd"]
        }
        measured = {name.rsplit(" ", 1)[1]: int(mask.sum()) for name, mask in objects.masks.items()}
        assert measured.keys() == areas.keys()
        assert sum(measured.values()) == pytest.approx(sum(areas.values()), rel=0.05)


def test_palette_masks_of_real_streets_hold_their_classes(shared_data: Path):
    folder = shared_data / "segmentation"
    found = open_masks(folder / "images" / "val", folder / "masks" / "val", void=11)
    assert len(found.pictures) == 80 and found.left_out == []
    objects = found.pictures[0].read()
    assert {int(name) for name in objects.masks} <= set(range(1, 11)) and objects.void.any()
