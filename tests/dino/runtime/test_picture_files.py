"""The files of a folder, found and remembered, against a naive walk; and what they weigh."""

import os
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest

from dino.runtime import picture_files
from dino.runtime.picture_files import PictureFiles, files_in, pictures_below, read_list
from dino.runtime.pictures import open_pictures

FILES = ("cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/notes.txt", "z.png")


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "set", *FILES)
    make(tmp_path / "elsewhere", "4.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "nowhere").symlink_to(tmp_path / "not yet")
    (tmp_path / "set" / "dog" / "5.png").symlink_to(tmp_path / "set" / "z.png")
    settle()
    return tmp_path / "set"


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"content")


def settle():
    """Past the tick of the clock that folders are dated by."""
    time.sleep(0.02)


def naive(folder, prefix=""):
    here = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [prefix + path.name for path in here if not path.is_dir()]
    for path in here:
        if path.is_dir():
            files += naive(path, f"{prefix}{path.name}/")
    return files


def expected(folder):
    """Names of pictures, as they are printed, and of other files."""
    files = naive(folder)
    pictures = [os.fsencode(name).decode(errors="replace") for name in files if name.endswith(".png")]
    return pictures, [name for name in files if not name.endswith(".png")]


def found(folder):
    pictures, others = pictures_below(folder)
    return [pictures.stamp(index)[0] for index in range(len(pictures))], list(others)


def refuse(*_):
    raise AssertionError("the folder was searched again")


def test_an_unchanged_folder_is_not_searched_again(folder, indexes, monkeypatch):
    first = found(folder)
    assert first == expected(folder)
    assert list(files_in(folder)) == naive(folder)
    monkeypatch.setattr(picture_files, "_files_in", refuse)
    assert found(folder) == first
    monkeypatch.chdir(folder.parent)
    assert found(Path("set")) == first
    (folder.parent / "another way").symlink_to(folder)
    assert found(Path("another way")) == first


CHANGES = {
    "a file is added": lambda top: make(top, "a.png"),
    "a file is added far below": lambda top: make(top, "cat/deep/a.png"),
    "a file is removed": lambda top: (top / "dog" / "3.png").unlink(),
    "a file is renamed": lambda top: (top / "cat" / "1.png").rename(top / "cat" / "7.png"),
    "a file moves": lambda top: (top / "cat" / "1.png").rename(top / "dog" / "1.png"),
    "a file becomes a folder": lambda top: ((top / "z.png").unlink(), make(top, "z.png/in.png")),
    "a folder is added": lambda top: (top / "new").mkdir(),
    "a full folder is added": lambda top: make(top, "cat/new/a.png"),
    "a folder is removed": lambda top: shutil.rmtree(top / "cat" / "deep"),
    "folders change places": lambda top: (
        (top / "cat").rename(top / "tmp"),
        (top / "dog").rename(top / "cat"),
        (top / "tmp").rename(top / "dog"),
    ),
    "a linked folder changes": lambda top: make(top.parent, "elsewhere/a.png"),
    "a linked folder goes": lambda top: shutil.rmtree(top.parent / "elsewhere"),
    "where a link leads comes to be a folder": lambda top: make(top.parent, "not yet/a.png"),
    "the whole folder is another": lambda top: (top.rename(top.parent / "old"), make(top, *FILES[2:])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_names_is_found(folder, indexes, change):
    before = found(folder)
    CHANGES[change](folder)
    settle()
    assert found(folder) == expected(folder)
    assert change == "a folder is added" or found(folder) != before
    assert found(folder) == expected(folder)


def test_a_change_of_the_dates_alone_cannot_hide_a_file(folder, indexes):
    before = (folder / "cat").stat()
    found(folder)
    make(folder, "cat/late.png")
    os.utime(folder / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "cat/late.png" in found(folder)[0]


def test_what_another_pillow_reads_is_found_at_once(folder, indexes, monkeypatch):
    make(folder, "a.new")
    settle()
    assert "a.new" in found(folder)[1]
    monkeypatch.setattr(picture_files, "suffixes", lambda: {".png", ".new"})
    monkeypatch.setattr(picture_files, "is_picture_name", lambda name: name[-4:] in {".png", ".new"})
    assert "a.new" in found(folder)[0]


@pytest.mark.parametrize("layout", [(), ("one.png",), ("no picture.txt",), ("a/1.png", "b/2.png", "b/3.png")])
def test_pictures_and_classes_are_the_same_from_the_index(tmp_path, indexes, layout):
    (tmp_path / "set").mkdir()
    make(tmp_path / "set", *layout)
    settle()
    opened = []
    for _ in range(2):
        try:
            pictures = open_pictures(str(tmp_path / "set"))
        except ValueError as error:
            opened.append(str(error))
        else:
            names = [pictures.name(index) for index in range(len(pictures))]
            opened.append((names, pictures.labels, pictures.classes))
    assert opened[0] == opened[1]
    assert len(list(indexes.glob("*.npz"))) == bool(layout)


def test_a_loop_and_odd_names_come_back_from_the_index(tmp_path, indexes):
    try:
        make(tmp_path / "set", "caf\udce9.png", "caf\udce9.txt", "two\nlines.png", "日本.png", " .png")
    except OSError:
        pytest.skip("this file system takes only text")
    everything = expected(tmp_path / "set")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    settle()
    assert found(tmp_path / "set") == found(tmp_path / "set") == everything


def test_the_folders_of_a_split_are_found_among_many_files(tmp_path):
    make(tmp_path, "TRAIN/1.png", "Val/2.png", "notes.txt")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert open_pictures(str(tmp_path), split="val").name(0) == str(tmp_path / "Val" / "2.png")


def test_a_picture_costs_its_path_and_a_few_bytes(tmp_path):
    count, path = 40_000, "n{:08d}/n{:08d}_{:06d}.JPEG"
    names = (path.format(index // 40, index // 40, index) for index in range(count))
    (tmp_path / "list.csv").write_text(
        "".join(f"{name},class{index % 7}\n" for index, name in enumerate(names))
    )
    tracemalloc.start()
    try:
        pictures = read_list(tmp_path / "list.csv")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pictures) == count
    assert pictures.name(count - 1).endswith(path.format(999, 999, count - 1))
    per_picture = len(path.format(0, 0, 0)) + 8 + 8  # the path, where it ends, and a reference to its label
    assert kept < count * per_picture * 1.1
    assert peak < count * 4 * per_picture


def test_a_spawned_worker_gets_the_paths_in_one_piece(tmp_path):
    count = 10_000
    pictures = PictureFiles(tmp_path, [f"{index:010d}.png" for index in range(count)])
    content = pickle.dumps(pictures, protocol=5)
    assert len(content) < count * (14 + 8) + 1000
    assert pickle.loads(content).name(count - 1) == str(tmp_path / "0000009999.png")
