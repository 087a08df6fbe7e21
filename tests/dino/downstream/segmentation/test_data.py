import numpy as np
import pytest
from PIL import Image

from dino.downstream.segmentation.classes import (
    VOID,
    Classes,
    UnknownIdError,
    check_same,
    read_ade_names,
    read_class_names,
)
from dino.downstream.segmentation.data import open_data, read_ids
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
from tests.dino.downstream.segmentation.small_sets import (
    SIZE,
    halves,
    write_mask,
    write_picture,
    write_set,
)


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path)


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_masks_give_their_numbers_whatever_they_are_stored_as(tmp_path, mode):
    ids = halves(3, 300 if mode == "I;16" else 200)
    write_mask(tmp_path / "mask.png", ids, mode)
    assert np.array_equal(read_ids(tmp_path / "mask.png"), ids)


def test_one_bit_masks_are_0_and_1(tmp_path):
    Image.fromarray(halves(0, 1).astype(bool)).save(tmp_path / "mask.png")
    assert np.array_equal(read_ids(tmp_path / "mask.png"), halves(0, 1))


def test_classes_are_the_numbers_in_the_masks(folder):
    write_mask(folder / "masks/train/0.png", halves(0, 40))
    data = open_data(str(folder))
    assert data.classes.ids == (0, 1, 2, 40)
    _, places = data.train.read(0)
    assert np.array_equal(places, halves(0, 3))


@pytest.mark.parametrize("masks", ["masks", "annotations", "labels"])
def test_masks_lie_in_a_folder_of_one_of_three_names(tmp_path, masks):
    data = open_data(str(write_set(tmp_path, masks=masks)))
    assert (len(data.train), len(data.val), data.notes) == (4, 4, [])


def test_pictures_in_subfolders_have_their_masks_there(folder):
    write_picture(folder / "images/train/street/a.jpg")
    write_mask(folder / "masks/train/street/a.png", halves(1, 1))
    data = open_data(str(folder))
    names = [entry.name for entry in data.train.pictures]
    assert "train/street/a.jpg" in names
    assert (data.train.read(names.index("train/street/a.jpg"))[1] == 1).all()


def test_ignored_numbers_are_void_and_no_class(folder):
    data = open_data(str(folder), ignore=(1, 255))
    assert data.classes.ids == (0, 2)
    assert np.array_equal(data.train.read(0)[1], halves(0, VOID))


def test_a_class_called_unlabelled_counts_until_its_number_is_ignored(folder):
    (folder / "classes.txt").write_text("0\tsky\n1\troad\n2\tunlabelled\n")
    assert open_data(str(folder)).classes.names == ("sky", "road", "unlabelled")
    assert open_data(str(folder), ignore=(2,)).classes.names == ("sky", "road")


def test_ade20k_has_150_classes_from_number_1_on(tmp_path):
    root = write_set(tmp_path, parts=("training", "validation"), masks="annotations")
    data = open_data(str(root))
    assert (data.classes.ids[0], data.classes.ids[-1], len(data.classes)) == (1, 150, 150)
    assert np.array_equal(data.train.read(0)[1], halves(VOID, 0))
    assert any("0 is no class" in note for note in data.notes)


def test_ade20ks_layout_with_zero_as_a_class_when_told(tmp_path):
    root = write_set(tmp_path, parts=("training", "validation"), masks="annotations")
    data = open_data(str(root), reduce_zero_label=False, num_classes=3)
    assert data.classes.ids == (0, 1, 2)


def test_ade20ks_own_table_names_the_classes(tmp_path):
    root = write_set(tmp_path, parts=("training", "validation"), masks="annotations")
    table = "Idx\tRatio\tTrain\tVal\tName\n1\t.2\t1\t1\twall\n2\t.1\t1\t1\tbuilding, edifice\n"
    (root / "objectInfo150.txt").write_text(table)
    assert open_data(str(root)).classes.names == ("wall", "building")
    (root / "objectInfo150.txt").write_text("something else\nentirely")
    with pytest.raises(UserError, match="is not ADE20k's table"):
        read_ade_names(root / "objectInfo150.txt")


def test_zero_can_be_reduced_in_any_layout(folder):
    assert open_data(str(folder), reduce_zero_label=True).classes.ids == (1, 2)


def test_a_given_number_of_classes_skips_what_is_ignored():
    assert Classes.numbered(3, frozenset({0, 2})).ids == (1, 3, 4)


def test_known_classes_hold_whatever_the_folder_says(folder):
    (folder / "classes.txt").write_text("0\ta\n1\tb\n2\tc\n")
    known = Classes((0, 1), ("x", "y"), frozenset({2}))
    assert open_data(str(folder), known=known).classes.names == ("x", "y")
    fallback = Classes((0, 1, 2, 3), ("w", "x", "y", "z"))
    assert open_data(str(folder), fallback=fallback).classes.names == ("a", "b", "c")
    (folder / "classes.txt").unlink()
    assert open_data(str(folder), fallback=fallback).classes.names == ("w", "x", "y", "z")


def test_ids_come_back_from_places():
    classes = Classes((1, 7, 300), ("a", "b", "c"), frozenset({0}))
    ids = np.array([[1, 300], [7, 0]])
    assert np.array_equal(classes.places(ids), [[0, 2], [1, VOID]])
    assert np.array_equal(classes.ids_of(np.array([0, 1, 2])), [1, 7, 300])
    assert Classes.from_plain(classes.plain()) == classes


@pytest.mark.parametrize("number", [2, 70_000, -3])
def test_a_number_that_is_no_class_is_named(number):
    with pytest.raises(UnknownIdError, match=str(number)):
        Classes.numbered(2).places(np.array([[0, number]]))


def test_pictures_are_read_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_picture(folder / "images/train/turned.jpg", size=SIZE[::-1], exif=exif)
    write_mask(folder / "masks/train/turned.png", halves(0, 1))
    data = open_data(str(folder))
    image, places = data.train.read(len(data.train) - 1)
    assert image.shape[:2] == places.shape == SIZE[::-1]


def test_an_all_ignored_mask_is_read_as_void(folder):
    write_mask(folder / "masks/train/0.png", halves(255, 255))
    assert (open_data(str(folder)).train.read(0)[1] == VOID).all()


def test_what_has_no_partner_is_named_and_counted(folder):
    write_picture(folder / "images/train/alone.jpg")
    write_mask(folder / "masks/val/nobody.png", halves(0, 1))
    data = open_data(str(folder))
    assert len(data.train) == len(data.val) == 4
    assert data.notes == [
        f"1 pictures of {folder}/images/train have no mask (alone)",
        f"1 masks of {folder}/masks/val have no picture (nobody)",
    ]


def test_an_unreadable_picture_is_named_when_its_turn_comes(folder):
    (folder / "images/train/0.png").write_bytes(b"no picture")
    data = open_data(str(folder))
    with pytest.raises(BrokenImageError, match="not a picture"):
        data.train.read(0)


def test_val_alone_is_enough_to_score(tmp_path):
    data = open_data(str(write_set(tmp_path, parts=("val",))), need_train=False)
    assert (len(data.train), len(data.val)) == (0, 4)


def break_nothing_there(root):
    return root / "nowhere"


def break_no_masks(root):
    (root / "masks").rename(root / "other")
    return root


def break_no_val(root):
    (root / "images/val").rename(root / "images/other")
    return root


def break_no_pairs(root):
    for mask in (root / "masks/train").iterdir():
        mask.rename(mask.with_name(f"x{mask.name}"))
    return root


def break_colours(root):
    write_picture(root / "masks/train/1.png")
    return root


def break_size(root):
    write_mask(root / "masks/train/1.png", halves(0, 1)[:-8])
    return root


def break_beyond(root):
    (root / "classes.txt").write_text("0\ta\n1\tb\n2\tc\n")
    write_mask(root / "masks/val/2.png", halves(0, 17))
    return root


def break_two_pictures(root):
    write_picture(root / "images/train/1.jpg")
    return root


def break_names(root):
    (root / "classes.txt").write_text("0\ta\nroad\t1\n")
    return root


def break_twice(root):
    (root / "classes.txt").write_text("0\ta\n0\tb\n")
    return root


def break_no_names(root):
    (root / "classes.txt").write_text("\n")
    return root


def break_all_ignored(root):
    for mask in root.rglob("masks/*/*.png"):
        write_mask(mask, halves(255, 255))
    return root


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (break_nothing_there, "a folder is needed that holds images/ and masks/ or annotations/ or labels/"),
        (break_no_masks, "has images/ but no masks/ or annotations/ or labels/"),
        (break_no_val, "images has no val/ or valid/ or validation/ or test/"),
        (break_no_pairs, r"no picture of .*train \(4\) has a mask in .*train \(4\)"),
        (break_colours, "masks/train/1.png: holds RGB colours; a mask holds numbers"),
        (break_size, "masks/train/1.png: the mask is 64 x 40 pixels, the upright picture 64 x 48"),
        (break_beyond, "masks/val/2.png has pixels of number 17, .* classes are 0 to 2; .*--ignore"),
        (break_two_pictures, "holds both 1.jpg and 1.png"),
        (break_names, "classes.txt, line 2: 'road"),
        (break_twice, "line 2: id 0 has a name already, 'a'"),
        (break_no_names, "names no classes"),
        (break_all_ignored, "there are 0 classes"),
    ],
)
def test_data_that_cannot_be_is_refused_in_a_sentence(folder, break_it, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        open_data(str(break_it(folder)))
    assert "\n" not in str(refused.value)


def test_names_and_a_number_of_classes_must_agree(folder):
    (folder / "classes.txt").write_text("0\ta\n1\tb\n2\tc\n")
    with pytest.raises(UserError, match=r"--num_classes 2: .* of 3 classes"):
        open_data(str(folder), num_classes=2)


def test_too_few_classes_are_refused_by_the_mask_that_has_more(folder):
    with pytest.raises(UserError, match=r"masks/train/1.png has pixels of number 2, .* larger --num_classes"):
        open_data(str(folder), num_classes=2)


def test_without_looking_through_a_wrong_mask_is_named_when_its_turn_comes(folder):
    data = open_data(str(folder), num_classes=2, look_through=False)
    with pytest.raises(BrokenImageError, match=r"1.png: has pixels of 2, which is no class"):
        data.train.read(1)
    break_size(folder)
    with pytest.raises(BrokenImageError, match=r"1.png: the mask is 64 x 40"):
        open_data(str(folder), num_classes=3, look_through=False).train.read(1)


def test_names_may_be_of_any_language(tmp_path):
    (tmp_path / "classes.txt").write_text("0\tStraße\n1\t道路\n2\t\n", encoding="utf-8")
    names = read_class_names(tmp_path / "classes.txt")
    assert Classes.named(names).names == ("Straße", "道路", "class 2")


def test_classes_of_a_network_and_of_data_must_be_the_same():
    two, three, other = Classes.numbered(2), Classes.numbered(3), Classes((0, 5), ("a", "b"))
    check_same(two, Classes((0, 1), ("any", "name")), "w.pth")
    with pytest.raises(UserError, match=r"w.pth is for 2 classes, the data has 3"):
        check_same(two, three, "w.pth")
    with pytest.raises(UserError, match="for the classes 0 to 1, and the data has 0, 5"):
        check_same(two, other, "w.pth")


def test_the_camvid_set_has_eleven_classes(shared_data):
    data = open_data(str(shared_data / "segmentation"), ignore=(11,), look_through=False)
    assert (len(data.train), len(data.val), len(data.classes)) == (200, 80, 11)
    image, places = data.val.read(0)
    assert image.shape == (360, 480, 3)
    assert set(np.unique(places)) <= {VOID, *range(11)}
