import re
import shutil

import numpy as np
import pytest

from dino.evaluation.labelled_sets import (
    are_one_set,
    class_numbers,
    open_one_or_two,
    open_train_and_val,
    open_val,
)
from dino.runtime.options import UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import write_pictures


@pytest.fixture
def folder(tmp_path):
    """Two classes in train/ and the same in val/."""
    write_pictures(tmp_path / "train", count=3)
    write_pictures(tmp_path / "val", count=2, seed=1)
    return tmp_path


@pytest.fixture
def opened():
    """Opens both sets; returns them and what is said."""

    def opened(folder):
        said = []
        return *open_train_and_val(str(folder), say=said.append), said

    return opened


def refused(folder, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        open_train_and_val(str(folder), say=lambda _: None)


def test_two_sets_with_the_same_classes_are_opened_without_a_word(folder, opened):
    train, val, said = opened(folder)
    assert (len(train), len(val), said) == (6, 4, [])
    assert train.classes == val.classes == ["cats", "dogs"]


def test_empty_class_folders_are_named_and_do_not_count(folder, opened):
    (folder / "train" / "birds").mkdir()
    (folder / "train" / "ants").mkdir()
    (folder / "train" / "ants" / "notes.txt").write_text("none yet")
    (folder / "train" / "ants" / ".thumb.png").write_bytes(b"hidden")
    (folder / "train" / ".cache").mkdir()
    (folder / "val" / "birds").mkdir()
    train, val, said = opened(folder)
    assert train.classes == val.classes == ["cats", "dogs"]
    assert said == [
        "2 class folders of train/ hold no pictures and do not count: ants, birds",
        "1 class folders of val/ hold no pictures and do not count: birds",
    ]


def test_many_empty_class_folders_are_counted_and_five_named(folder, opened):
    for number in range(7):
        (folder / "val" / f"empty{number}").mkdir()
    assert opened(folder)[-1] == [
        "7 class folders of val/ hold no pictures and do not count: empty0, empty1, empty2, empty3, empty4, ..."
    ]


def test_empty_class_folders_of_a_single_set_are_named_too(folder):
    (folder / "train" / "birds").mkdir()
    said = []
    open_one_or_two(str(folder / "train"), one_will_do=True, say=said.append)
    assert said == ["1 class folders of train/ hold no pictures and do not count: birds"]


def test_class_folders_that_hold_only_folders_or_links_of_pictures_are_not_empty(folder, opened):
    (folder / "elsewhere").mkdir()
    (folder / "train" / "cats" / "0.png").rename(folder / "elsewhere" / "0.png")
    (folder / "train" / "linked").mkdir()
    (folder / "train" / "linked" / "there").symlink_to(folder / "elsewhere")
    train, _, said = opened(folder)
    assert train.classes == ["cats", "dogs", "linked"]
    assert said == ["val has no pictures of 1 of train's 3 classes: linked"]


def test_train_may_have_more_classes_which_are_named(folder, opened):
    shutil.copytree(folder / "train" / "cats", folder / "train" / "bobcats")
    train, val, said = opened(folder)
    assert said == ["val has no pictures of 1 of train's 3 classes: bobcats"]
    assert class_numbers(val.classes, train.classes).tolist() == [1, 2]


def test_classes_that_train_lacks_are_a_named_mistake(folder):
    (folder / "val" / "dogs").rename(folder / "val" / "Dogs")
    refused(
        folder,
        "val has 1 of its 2 classes without any in train: Dogs; both need the same class folders",
    )


def test_sets_of_one_class_are_refused(folder):
    shutil.rmtree(folder / "val" / "dogs")
    ending = "have no classes, or one only; two or more are needed, each a folder of its own"
    refused(folder, f"the val pictures of {folder} {ending}")
    shutil.rmtree(folder / "train" / "cats")
    refused(folder, f"the train pictures of {folder} {ending}")


def test_one_set_will_do_only_where_it_is_said(folder):
    refused(
        folder / "train",
        f"--data_path {folder / 'train'} is one set of pictures; two are needed: a folder that holds train/ and val/, "
        "the name of a torchvision set, or demo",
    )
    train, val = open_one_or_two(str(folder / "train"), one_will_do=True, say=lambda _: None)
    assert len(train) == 6 and val is None


def test_demo_has_two_sets():
    train, val = open_train_and_val("demo", say=lambda _: None)
    assert not are_one_set(train, val) and train.classes == val.classes


def test_sets_of_as_many_pictures_are_told_apart(folder):
    val, train = (open_pictures(str(folder), split=split) for split in ("val", "train"))
    assert are_one_set(val, val) and not are_one_set(train, val)
    for number in (0, 1):
        (folder / "train" / ("cats", "dogs")[number] / "2.png").unlink()
    train = open_pictures(str(folder), split="train")
    assert len(train) == len(val) and not are_one_set(train, val)


def test_class_numbers_turn_labels_of_one_set_into_those_of_another():
    known = ["ant", "bee", "cat", "dog"]
    numbers = class_numbers(["bee", "dog"], known)
    labels = np.array([0, 1, 1, 0])
    assert [known[number] for number in numbers[labels]] == ["bee", "dog", "dog", "bee"]
    assert numbers.dtype == np.int64


# To score alone


@pytest.mark.parametrize("name", ["val", "test", "validation"])
def test_val_alone_has_its_own_classes(folder, name):
    shutil.rmtree(folder / "train")
    (folder / "val").rename(folder / name)
    val, classes = open_val(str(folder))
    assert (len(val), classes) == (4, ["cats", "dogs"])


def test_val_beside_train_is_numbered_by_trains_classes(folder):
    shutil.copytree(folder / "train" / "cats", folder / "train" / "bobcats")
    val, classes = open_val(str(folder))
    assert (len(val), val.classes, classes) == (4, ["cats", "dogs"], ["bobcats", "cats", "dogs"])


def test_a_folder_of_classes_is_the_val_set(folder):
    val, classes = open_val(str(folder / "val"))
    assert (len(val), classes) == (4, ["cats", "dogs"])


def test_val_without_classes_is_refused(folder):
    sentence = f"the pictures of {folder}/val/cats have no classes, or one only; give each class a folder"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        open_val(str(folder / "val" / "cats"))
    shutil.rmtree(folder / "val" / "dogs")
    with pytest.raises(UserError, match=r"^the val pictures of .* have no classes, or one only"):
        open_val(str(folder))
    with pytest.raises(UserError, match="is no file or folder"):
        open_val(str(folder / "nowhere"))
