"""What a shard may hold, what is remembered of it, and what that weighs."""

import io
import os
import random
import re
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest

from dino.runtime import file_index, tar_index
from dino.runtime.pictures import Pictures, open_pictures
from tests.dino.runtime.small_shards import add_link, png, reds, refused, write

# Nothing leaves a shard


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "../../x.png",
        "/etc/x.png",
        "a/../../x.png",
        "a/..",
        "//x.png",
        "../.hidden.png",
        "../x.cls",
        "../x",
    ],
)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_file_outside_of_the_folder_is_refused(tmp_path: Path, name: str, form: int) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        for path in ("a.png", name):
            header = tarfile.TarInfo(path)
            header.size = len(png(7))
            tar.addfile(header, io.BytesIO(png(7)))
    sentence = (
        f"shard {tmp_path}/s.tar: the file {name!r} would be outside of the folder that it is unpacked in: "
        "make it again, with paths that have no '..' and do not begin at the root"
    )
    refused(tmp_path / "s.tar", re.escape(sentence))


def test_a_link_out_of_the_folder_is_refused_too(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", {"a.png": png(0)})
    add_link(shard, "../b.png", "a.png")
    refused(shard, r"shard .*: the file '\.\./b\.png' would be outside of .*")


def test_dots_that_lead_nowhere_are_names(tmp_path: Path) -> None:
    shard = write(tmp_path / "s.tar", {"./a.png": png(1), "b..c.png": png(2), "./d/./..e/f.png": png(3)})
    assert reds(open_pictures(str(shard))) == [1, 2, 3]


def test_nothing_outside_of_the_shard_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    shard = write(tmp_path / "s.tar", {"a.png": png(1)})
    kinds = (tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    with tarfile.open(shard, "a") as tar:
        for number, kind in enumerate(kinds):
            header = tarfile.TarInfo(f"{number}.png")
            header.type, header.linkname = kind, str(secret)
            header.devmajor, header.devminor = 1, 5  # /dev/zero, which has no end
            tar.addfile(header)
    assert reds(open_pictures(str(shard))) == [1]
    add_link(shard, "b.png", str(secret))
    refused(
        shard, rf"shard .*: b\.png is a hard link to {re.escape(str(secret))}, which is not before it: .*"
    )


def test_a_size_below_zero_is_damage_and_no_endless_loop(tmp_path: Path) -> None:
    shard = write(tmp_path / "s.tar", {"a.png": png(0), "b.png": png(1)})
    content = bytearray(shard.read_bytes())
    content[124:136] = (-1024).to_bytes(12, "big", signed=True)
    checksum = sum(content[:148]) + 8 * ord(" ") + sum(content[156:512])
    content[148:156] = b"%06o\0 " % checksum
    shard.write_bytes(content)
    refused(shard, rf"shard {re.escape(str(shard))} is damaged after \d files \(.+\): make it again .*")


# Kept from one start to the next


def state(pictures: Pictures) -> tuple[object, ...]:
    names = [pictures.name(index) for index in range(len(pictures))]
    stamps = [pictures.stamp(index) for index in range(len(pictures))]
    return names, stamps, reds(pictures), pictures.labels, pictures.classes


def settle() -> None:
    """Past the tick of the clock that files are dated by."""
    time.sleep(0.02)


def test_unchanged_shards_are_not_read_again(
    tmp_path: Path, indexes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "caf\udce9/ü.png"
    write(tmp_path / "0.tar", {"k.cls": b"10", "k.png": png(0), "l.png": png(1), "l.cls": b"9"})
    write(tmp_path / "1.tar", {odd: png(2), "caf\udce9/ü.cls": b"10", "m.cls": b"11", "m.png": png(4)})
    settle()
    first = state(open_pictures(str(tmp_path)))
    assert first[2:] == ([0, 1, 2, 4], [1, 0, 1, 2], ["9", "10", "11"])
    with monkeypatch.context() as patch:
        patch.delattr(tarfile, "open")
        assert state(open_pictures(str(tmp_path))) == first
        assert len(open_pictures(f"{tmp_path}/*.tar")) == 4
    before = (tmp_path / "1.tar").stat()
    write(tmp_path / "1.tar", {odd: png(5), "caf\udce9/ü.cls": b"10", "m.cls": b"12", "m.png": png(6)})
    os.utime(tmp_path / "1.tar", ns=(before.st_atime_ns, before.st_mtime_ns))
    settle()
    changed = state(open_pictures(str(tmp_path)))
    assert changed[2:] == ([0, 1, 5, 6], [1, 0, 1, 2], ["9", "10", "12"])
    assert state(open_pictures(str(tmp_path))) == changed


def test_a_mistake_in_the_shards_is_said_at_every_start(tmp_path: Path, indexes: Path) -> None:
    write(tmp_path / "0.tar", {"k.cls": b"1", "k.png": png(0), "l.png": png(1)})
    settle()
    for _ in range(2):
        refused(tmp_path / "0.tar", r"1 of the 2 pictures in the shards have a label .*")


def test_what_another_pillow_reads_is_found_at_once(
    tmp_path: Path, indexes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "0.tar", {"a.png": png(1), "b.new": png(2)})
    settle()
    assert reds(open_pictures(str(tmp_path / "0.tar"))) == [1]
    monkeypatch.setattr(tar_index, "suffixes", lambda: {".png", ".new"})
    monkeypatch.setattr(tar_index, "is_picture_name", lambda name: name[-4:] in {".png", ".new"})
    assert reds(open_pictures(str(tmp_path / "0.tar"))) == [1, 2]


def by_the_rules(files: list[str]) -> list[tuple[str, str | None]]:
    """The pictures to read and their labels, where a label's content is its place, the slow and plain way."""

    def sample(name: str) -> str:
        folder, slash, file = name.rpartition("/")
        return folder + slash + file.split(".")[0]

    pictures = [name for name in files if name.endswith(".png")]
    labels = {sample(name): str(place) for place, name in enumerate(files) if name.endswith(".cls")}
    plain: dict[str, str] = {}
    for name in pictures:
        if name.split("/")[-1].count(".") == 1:
            plain.setdefault(sample(name), name)
    return [(name, labels.get(sample(name))) for name in pictures if plain.get(sample(name), name) == name]


def test_samples_are_made_of_files_in_any_order_by_the_plain_rules(tmp_path: Path) -> None:
    generator = random.Random(0)
    names = [
        f"{folder}{key}.{rest}"
        for folder in ("", "b/")
        for key in "xyz"
        for rest in ("png", "v.png", "cls", "v.cls")
    ]
    unlabelled = 0
    for _ in range(40):
        files = generator.sample(names, generator.randint(1, len(names)))
        expected = by_the_rules(files)
        contents = {name: str(place).encode() for place, name in enumerate(files)}
        shard = write(
            tmp_path / "s.tar", {name: png(1) if "png" in name else contents[name] for name in files}
        )
        labels = [label for _, label in expected if label is not None]
        if 0 < len(labels) < len(expected):
            refused(shard, rf"{len(labels)} of the {len(expected)} pictures .*")
        elif expected:
            pictures = open_pictures(str(shard))
            assert [pictures.name(index) for index in range(len(pictures))] == [
                f"{shard}/{name}" for name, _ in expected
            ]
            if pictures.labels is not None:
                assert [pictures.classes[label] for label in pictures.labels] == labels
            else:
                unlabelled += 1
                assert len(set(labels)) < 2
    assert 0 < unlabelled < 40


def test_a_member_costs_its_name_and_a_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_index, "_QUICK", float("inf"))
    count = 4000
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(count):
            tar.addfile(tarfile.TarInfo(f"{index:020d}.png"))
    open_pictures(str(tmp_path / "s.tar"))  # what is loaded once
    tracemalloc.start()
    try:
        pictures = open_pictures(str(tmp_path / "s.tar"))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pictures) == count
    name, places = 24, 8 + 4 + 8 + 8
    assert kept < count * (name + places) + 20_000
    assert peak < count * 4 * (name + places) + 1_200_000  # the end is read by the megabyte


def test_a_label_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    shard = tmp_path / "s.tar"
    with shard.open("wb") as file:
        header = tarfile.TarInfo("a.cls")
        header.size = 3 << 30
        file.write(header.tobuf())
        file.truncate(len(header.tobuf()) + header.size + 1024)  # a file of holes
    refused(shard, f"shard {re.escape(str(shard))}: a.cls is no label but 3,221,225,472 bytes: make it again")
