"""Folders, lists and patterns, and how `open_pictures` chooses."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dino.runtime.demo_pictures import DemoPictures
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, Spread, open_pictures

SUFFIXES_READ = ".jpg, .jpeg, .png, .webp, .tif, .bmp, .gif and 51 other suffixes are read"


def make(root: Path, *names: str) -> None:
    """PNG files, each of one colour, told by its place among the names."""
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (number, 0, 0)).save(file, "PNG")


def names(pictures: Pictures, root: Path) -> list[str]:
    return [str(Path(pictures.name(index)).relative_to(root)) for index in range(len(pictures))]


def refused(data_path: str | Path, sentence: str, **options: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        open_pictures(str(data_path), **options)


# Folders


def test_a_folder_of_class_folders_is_an_image_folder(tmp_path: Path) -> None:
    make(tmp_path, "dog/b.png", "dog/a.jpeg", "cat/deep/x.jpg", "cat/c.webp", "10/d.bmp", "9/e.png")
    pictures, reference = open_pictures(str(tmp_path)), ImageFolder(tmp_path)
    assert pictures.classes == reference.classes
    assert pictures.labels == reference.targets
    assert [pictures.name(index) for index in range(6)] == [path for path, _ in reference.samples]
    for index in range(6):
        assert np.array_equal(pictures.picture(index), reference[index][0])


@pytest.mark.parametrize(
    "layout",
    [
        ("b.png", "a.png"),
        ("only/b.png", "only/a.png"),
        ("cat/a.png", "dog/a.png", "stray.png"),
    ],
)
def test_flat_and_mixed_folders_have_no_labels(tmp_path: Path, layout: tuple[str, ...]) -> None:
    make(tmp_path, *layout)
    pictures = open_pictures(str(tmp_path))
    assert (pictures.labels, pictures.classes) == (None, [])
    assert len(pictures) == len(layout)


def test_only_visible_files_with_a_suffix_of_pictures_count(tmp_path: Path) -> None:
    make(tmp_path, "a.JPG", "b.PnG", ".c.png", ".thumbs/d.png", "e.txt", "f.pdf", "png", "g.png.part")
    assert names(open_pictures(str(tmp_path)), tmp_path) == ["a.JPG", "b.PnG"]


def test_order_is_alphabetical_whatever_the_order_of_creation(tmp_path: Path) -> None:
    make(tmp_path, "z.png", "b/2.png", "b/10.png", "B/1.png", "a/1.png", "c.png", "b/ä.png")
    expected = ["c.png", "z.png", "B/1.png", "a/1.png", "b/10.png", "b/2.png", "b/ä.png"]
    assert names(open_pictures(str(tmp_path)), tmp_path) == expected


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/1.png", "set/dog/1.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dog" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere")
    pictures = open_pictures(str(tmp_path / "set"))
    assert names(pictures, tmp_path / "set") == ["cat/1.png", "dog/1.png", "dog/gone.png"]
    assert pictures.classes == ["cat", "dog"]
    with pytest.raises(BrokenImageError, match="no such file or directory"):
        pictures.picture(2)


def test_a_link_to_itself_and_a_pipe_do_not_spoil_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "1.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "to_pipe.png").symlink_to(tmp_path / "pipe.png")
    assert names(open_pictures(str(tmp_path)), tmp_path) == ["1.png"]
    assert names(open_pictures(f"{tmp_path}/*"), tmp_path) == ["1.png"]


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_a_folder_of_train_and_val_gives_the_split(tmp_path: Path, held_out: str) -> None:
    make(tmp_path, "train/cat/1.png", "train/dog/2.png", f"{held_out}/cat/3.png", f"{held_out}/dog/4.png")
    assert names(open_pictures(str(tmp_path)), tmp_path) == ["train/cat/1.png", "train/dog/2.png"]
    val = open_pictures(str(tmp_path), split="val")
    assert names(val, tmp_path) == [f"{held_out}/cat/3.png", f"{held_out}/dog/4.png"]
    assert val.classes == ["cat", "dog"]


def test_val_comes_before_test(tmp_path: Path) -> None:
    make(tmp_path, "train/1.png", "test/2.png", "val/3.png")
    assert names(open_pictures(str(tmp_path), split="val"), tmp_path) == ["val/3.png"]


def test_train_may_be_a_class_and_pictures_beside_it_alone_keep_a_folder_whole(tmp_path: Path) -> None:
    make(tmp_path / "a", "train/1.png", "plane/2.png")
    assert open_pictures(str(tmp_path / "a")).classes == ["plane", "train"]
    make(tmp_path / "b", "train/1.png", "3.png")
    assert len(open_pictures(str(tmp_path / "b"))) == 2
    make(tmp_path / "c", "train/1.png", "val/2.png", "confusion.png")
    assert (
        len(open_pictures(str(tmp_path / "c"))) == len(open_pictures(str(tmp_path / "c"), split="val")) == 1
    )


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/1.png")
    assert names(open_pictures(str(tmp_path)), tmp_path) == ["train/1.png"]
    refused(tmp_path, f"{tmp_path} holds train/ but none of val/, valid/, validation/, test/", split="val")


def test_a_folder_without_pictures_says_what_it_saw(tmp_path: Path) -> None:
    refused(tmp_path, f"no pictures in {tmp_path}: 0 files seen; {SUFFIXES_READ}")
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b.heic", "deep/c.mp4"):
        (tmp_path / name).touch()
    refused(tmp_path, f"no pictures in {tmp_path}: 3 files seen; {SUFFIXES_READ}")


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "locked/1.png")
    scandir = os.scandir

    def guarded(folder: Path) -> object:
        if folder == tmp_path / "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    refused(tmp_path, f"cannot read {tmp_path / 'locked'}: Permission denied")


def test_names_that_are_not_text_can_be_printed(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        make(tmp_path, file.name)
    except OSError:
        pytest.skip("this file system takes only text")
    pictures = open_pictures(str(tmp_path))
    assert pictures.name(0).encode().endswith("caf\ufffd.png".encode())
    assert pictures.picture(0).size == (4, 3)


def test_pictures_can_be_pickled(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/2.png")
    copy = pickle.loads(pickle.dumps(open_pictures(str(tmp_path))))
    assert (copy.classes, copy.labels) == (["a", "b"], [0, 1])
    assert copy.picture(1).getpixel((0, 0)) == (1, 0, 0)


# Lists


def test_a_text_list_names_files_relative_to_itself(tmp_path: Path) -> None:
    make(tmp_path, "lists/x y.png", "other/z.png")
    content = f"\ufeffx y.png\r\n\r\n../other/z.png\r\n{tmp_path}/other/z.png\nmissing.png\n"
    (tmp_path / "lists" / "l.txt").write_text(content, encoding="utf-8")
    pictures = open_pictures(str(tmp_path / "lists" / "l.txt"))
    assert pictures.labels is None
    assert [pictures.picture(index).getpixel((0, 0))[0] for index in range(3)] == [0, 1, 1]
    with pytest.raises(BrokenImageError, match=r"lists/missing\.png: no such file or directory"):
        pictures.picture(3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.txt", "a.png\t10\nb.png\t9\na.png\t10\n"),
        ("l.csv", "a.png,10\nb.png,9\n\na.png,10\n"),
        ("l.csv", 'id,Label,"Path"\n0,10,a.png\n1,9,b.png\n2,10,a.png\n'),
        ("l.csv", "filename,class\na.png,10\nb.png,9\na.png,10\n"),
        ("l.csv", "image_path,label\na.png,10\nb.png,9\na.png,10\n"),
        ("l.csv", "class_id,file_name\n10,a.png\n9,b.png\n10,a.png\n"),
        ("l.csv", "photo,kind\na.png,10\nb.png,9\na.png,10\n"),
        ("l.csv", "photo,width,category\na.png,1,10\nb.png,2,9\na.png,1,10\n"),
        ("l.csv", "a.png;10\nb.png;9\na.png;10\n"),
        ("l.csv", 'Image;"Class"\na.png;"10"\nb.png;9\na.png;10\n'),
        ("l.csv", "img\tlabel\na.png\t10\nb.png\t9\na.png\t10\n"),
    ],
)
def test_a_list_may_give_classes(tmp_path: Path, name: str, content: str) -> None:
    make(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text(content)
    pictures = open_pictures(str(tmp_path / name))
    assert (pictures.classes, pictures.labels) == (["9", "10"], [1, 0, 1])
    assert names(pictures, tmp_path) == ["a.png", "b.png", "a.png"]


def test_a_first_row_without_a_suffix_is_a_picture_where_the_others_have_none_either(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("0001,cat\n0002,dog\n")
    assert names(open_pictures(str(tmp_path / "l.csv")), tmp_path) == ["0001", "0002"]


def test_a_header_without_a_class_column_gives_no_labels(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("image,width\na.png,10\nb.png,20\n")
    pictures = open_pictures(str(tmp_path / "l.csv"))
    assert (len(pictures), pictures.labels) == (2, None)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("l.txt", b"\n \n", " lists no pictures: it takes one path per line, then optionally a class"),
        ("l.csv", b"path,label\n", " lists no pictures: it takes one path per line, then optionally a class"),
        ("l.txt", b"a\tx\nb\n", " gives a class to 1 of its 2 pictures; give all one or none"),
        (
            "l.txt",
            b"\xff\xd8\xff",
            " is not a list of pictures in UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 0: "
            "invalid start byte",
        ),
    ],
)
def test_a_useless_list_is_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"{tmp_path / name}{problem}")


# Patterns


def test_a_pattern_gives_its_matches_in_order(tmp_path: Path) -> None:
    make(tmp_path, "b/2.png", "a/deep/1.png", "a/3.jpg", "a/.hidden.png", "a/notes.txt")
    assert names(open_pictures(f"{tmp_path}/**/*.png"), tmp_path) == ["a/deep/1.png", "b/2.png"]
    assert names(open_pictures(f"{tmp_path}/**"), tmp_path) == ["a/3.jpg", "a/deep/1.png", "b/2.png"]
    assert names(open_pictures(f"{tmp_path}/{{b,a}}/?.*"), tmp_path) == ["b/2.png", "a/3.jpg"]
    assert open_pictures(f"{tmp_path}/[ab]/*").labels is None


def test_a_recursive_pattern_follows_no_links_to_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/1.png", "a/deep/2.png", ".hidden/3.png", "[x]/4.png")
    for name in ("l", "m", "a/n"):
        (tmp_path / name).symlink_to(tmp_path)
    found = ["[x]/4.png", "a/1.png", "a/deep/2.png"]
    for pattern in ("**/*.png", "**", "**/**/*.png"):
        assert names(open_pictures(f"{tmp_path}/{pattern}"), tmp_path) == found
    assert names(open_pictures(f"{tmp_path}/l/a/**/*.png"), tmp_path / "l") == found[1:]
    assert names(open_pictures(f"{tmp_path}/.hidden/**"), tmp_path) == [".hidden/3.png"]
    monkeypatch.chdir(tmp_path)
    pictures = open_pictures("**/*.png")
    assert [pictures.name(index) for index in range(3)] == found


def test_a_pattern_may_be_relative_or_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_pictures("*.png").name(0) == "a.png"
    assert open_pictures("~/*.png").name(0) == str(tmp_path / "a.png")
    assert len(open_pictures("~")) == 1


def test_a_folder_whose_name_is_a_pattern_is_a_folder(tmp_path: Path) -> None:
    make(tmp_path, "[1]/a.png")
    assert len(open_pictures(f"{tmp_path}/[1]")) == 1


def test_a_pattern_without_pictures_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "0.png")
    refused(f"{tmp_path}/*.jpg", f"no pictures match {tmp_path}/*.jpg: 0 files do; {SUFFIXES_READ}")
    refused(f"{tmp_path}/*.txt", f"no pictures match {tmp_path}/*.txt: 1 files do; {SUFFIXES_READ}")
    pattern = f"{tmp_path}/{{0..1}}.png"
    refused(pattern, f"{tmp_path}/1.png, which {pattern} stands for, does not exist")


# The rest


def test_demo_is_the_embedded_set() -> None:
    for split in ("train", "val"):
        pictures = open_pictures("demo", split=split)
        assert isinstance(pictures, DemoPictures)
        assert pictures.split == split


def test_what_is_nothing_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    nothing = "is no file or folder, nor demo, nor a data set of torchvision"
    refused(tmp_path / "none", f"{tmp_path / 'none'} {nothing}")
    refused("cifar10", f"cifar10 {nothing}; did you mean CIFAR10 or CIFAR100?")
    refused("", "the path of the pictures is empty: it takes a folder, a list, a pattern or a name")


def test_other_files_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.png", "b.tar.gz")
    refused(
        tmp_path / "a.png", f"{tmp_path}/a.png is a file, but neither a list (.txt, .csv) nor a shard (.tar)"
    )
    refused(
        tmp_path / "b.tar.gz",
        f"{tmp_path}/b.tar.gz is compressed, and pictures are read from any place in it: uncompress it first",
    )


def test_an_unknown_split_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'val', got 'test'"):
        open_pictures("demo", split="test")


@pytest.mark.parametrize("count", [1, 3, 10, 20])
def test_a_spread_takes_pictures_from_all_over_a_set(count, tmp_path):
    for index in range(10):
        name = tmp_path / ("a" if index < 5 else "b") / f"{index}.png"
        name.parent.mkdir(exist_ok=True)
        Image.new("RGB", (index + 1, 2)).save(name)
    spread = Spread(open_pictures(str(tmp_path)), count)
    widths = [spread.picture(index).width - 1 for index in range(len(spread))]
    assert widths == {1: [0], 3: [0, 4, 9]}.get(count, list(range(10)))
    assert spread.labels == [int(width > 4) for width in widths] and spread.classes == ["a", "b"]
    assert [spread.name(index)[-5] for index in range(len(spread))] == [str(width) for width in widths]
