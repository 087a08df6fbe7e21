"""What tells sets of pictures apart, and what does not."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dino.runtime.fingerprint import Fingerprint, fingerprint
from dino.runtime.images import BrokenImageError
from dino.runtime.pictures import Pictures, Spread, open_pictures
from tests.dino.small_runs import write_pictures


class Made(Pictures):
    """Pictures that are no files: of one colour each; None is a broken one."""

    def __init__(self, colours, labels=None, names=None, size=(3, 2)):
        self._colours, self._names, self._size = (
            colours,
            names or [f"p{n}" for n in range(len(colours))],
            size,
        )
        self.labels = labels
        self.classes = ["a", "b"] if labels else []

    def __len__(self):
        return len(self._colours)

    def name(self, index):
        return self._names[index]

    def picture(self, index, *, at_least=None):
        if self._colours[index] is None:
            raise BrokenImageError(self.name(index), "broken")
        return Image.new("RGB", self._size, (self._colours[index], 0, 0))


@pytest.fixture
def photos(tmp_path):
    return write_pictures(tmp_path / "photos", count=3)


def of(path) -> Fingerprint:
    return fingerprint(open_pictures(str(path)))


def test_the_same_set_has_the_same_fingerprint_twice(photos):
    assert of(photos) == of(photos)
    assert len(of(photos).content) == len(of(photos).dated) == 64


def test_a_copy_elsewhere_has_the_content_and_a_moved_set_the_dates_too(photos, tmp_path):
    before = of(photos)
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    for file in (tmp_path / "copy").rglob("*.png"):
        os.utime(file, ns=(1, 1))
    assert of(tmp_path / "copy").content == before.content != before.dated
    assert of(tmp_path / "copy").dated != before.dated
    photos.rename(tmp_path / "moved")
    assert of(tmp_path / "moved") == before


def test_a_change_of_any_file_by_a_nanosecond_is_another_date(photos):
    file = photos / "dogs" / "1.png"
    changed = file.stat().st_mtime_ns
    os.utime(file, ns=(0, 1_000_000_000))
    before = of(photos)
    os.utime(file, ns=(0, 1_000_000_001))
    if file.stat().st_mtime_ns == 1_000_000_000:
        pytest.skip("this file system does not count nanoseconds")
    assert changed and of(photos).content == before.content and of(photos).dated != before.dated


def longer(photos):
    with (photos / "cats" / "0.png").open("ab") as file:
        file.write(b"x")


def renamed(photos):
    (photos / "cats" / "0.png").rename(photos / "cats" / "a.png")


def another_class(photos):
    (photos / "cats" / "0.png").rename(photos / "dogs" / "9.png")


def class_renamed(photos):
    (photos / "cats").rename(photos / "bobcats")


def fewer(photos):
    (photos / "cats" / "0.png").unlink()


@pytest.mark.parametrize("change", [longer, renamed, another_class, class_renamed, fewer])
def test_names_classes_and_sizes_make_another_set(photos, change):
    before = of(photos)
    change(photos)
    assert of(photos).content != before.content and of(photos).dated != before.dated


def test_classes_and_order_of_a_list_make_another_set(photos):
    prints = set()
    for lines in (
        ["cats/0.png\tx", "dogs/0.png\ty"],
        ["cats/0.png\ty", "dogs/0.png\tx"],
        ["dogs/0.png\ty", "cats/0.png\tx"],
        ["cats/0.png", "dogs/0.png"],
        ["cats/0.png\tx", "dogs/0.png\tz"],
    ):
        (photos / "list.txt").write_text("\n".join(lines))
        prints.add(of(photos / "list.txt").content)
    assert len(prints) == 5


def test_a_file_that_is_not_there_is_part_of_the_set(photos):
    (photos / "cats" / "0.png").unlink()
    before = of(photos)
    (photos / "cats" / "0.png").symlink_to(photos / "nowhere")
    assert of(photos).content != before.content
    pictures = open_pictures(str(photos))
    assert pictures.stamp(0) == ("cats/0.png", 0, 0)


def test_shards_are_known_by_their_members_and_dated_by_their_files(photos, tmp_path):
    def write(name, members=("a.png", "b.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in members:
                tar.add(photos / "cats" / "0.png", member)
        os.utime(tmp_path / name, ns=(0, 5_000_000_000))
        return tmp_path / name

    shard, before = write("s.tar"), of(tmp_path / "s.tar")
    size = (photos / "cats" / "0.png").stat().st_size
    assert open_pictures(str(shard)).stamp(1) == ("s.tar/b.png", size, 5_000_000_000)
    assert of(write("elsewhere/s.tar")) == before
    os.utime(shard, ns=(0, 6_000_000_000))
    assert of(shard).content == before.content and of(shard).dated != before.dated
    assert of(write("s.tar", ("b.png", "a.png"))).content != before.content


def test_a_part_of_a_set_is_another_set_and_has_its_files_stamps(photos):
    whole = open_pictures(str(photos))
    part = Spread(whole, 3)
    assert [part.stamp(index) for index in range(3)] == [whole.stamp(index) for index in part.indices]
    assert fingerprint(part).content != fingerprint(whole).content
    assert fingerprint(Spread(whole, 6)) == fingerprint(whole)


def test_sets_without_files_are_told_apart_by_names_labels_and_pixels():
    sets = [
        Made([1, 2, 3]),
        Made([9, 2, 3]),
        Made([1, 9, 3]),
        Made([1, 2, 9]),
        Made([1, 2, 3], labels=[0, 1, 1]),
        Made([1, 2, 3], labels=[0, 1, 0]),
        Made([1, 2, 3], names=["p0", "p2", "p1"]),
        Made([1, 2, 3], size=(2, 3)),
        Made([1, 2]),
        Made([None, 2, 3]),
        Made([1]),
    ]
    assert len({fingerprint(pictures).content for pictures in sets}) == len(sets)
    assert fingerprint(Made([1, 2, 3])) == fingerprint(Made([1, 2, 3]))


def test_demo_and_its_two_parts_have_lasting_fingerprints():
    train, val = (fingerprint(open_pictures("demo", split=split)) for split in ("train", "val"))
    assert train == fingerprint(open_pictures("demo", split="train")) and train.content != val.content


def test_files_are_not_looked_into(photos, monkeypatch):
    pictures = open_pictures(str(photos))
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("a file was opened"))
    monkeypatch.setattr(io, "open", lambda *_, **__: pytest.fail("a file was opened"))
    fingerprint(pictures)
