import gzip
import io
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.runtime.images import BrokenImageError
from dino.runtime.pictures import open_pictures
from tests.dino.runtime.small_shards import add_link, png, reds, refused, write


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(12):
        write(tmp_path / f"s-{number:03d}.tar", {"a.png": png(2 * number), "b.png": png(2 * number + 1)})
    return tmp_path


def test_a_folder_a_pattern_and_braces_read_the_same_shards(shards: Path) -> None:
    for data_path in (shards, shards / "s-*.tar", shards / "s-{000..011}.tar"):
        assert reds(open_pictures(str(data_path))) == list(range(24))
    pictures = open_pictures(str(shards / "s-{009..010}.tar"))
    assert reds(pictures) == [18, 19, 20, 21]
    assert reds(open_pictures(str(shards / "s-{004,002}.tar"))) == [8, 9, 4, 5]
    assert pictures.name(2) == f"{shards}/s-010.tar/a.png"


def test_one_shard_keeps_the_order_of_its_members_and_skips_what_is_no_picture(tmp_path: Path) -> None:
    shard = write(
        tmp_path / "s.tar", {"z/1.PNG": png(1), "z/1.json": b"{}", "a.png": png(2), "z/.thumb.png": png(3)}
    )
    with tarfile.open(shard, "a") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    pictures = open_pictures(str(shard))
    assert reds(pictures) == [1, 2]
    assert [Path(pictures.name(index)).name for index in range(2)] == ["1.PNG", "a.png"]
    assert pictures.labels is None


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_of_every_tar_format_are_read(tmp_path: Path, form: int) -> None:
    name = "/".join(["n" * 60] * 3) + "/ü.png"
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        header = tarfile.TarInfo(name)
        header.size = len(png(7))
        tar.addfile(header, io.BytesIO(png(7)))
    pictures = open_pictures(str(tmp_path / "s.tar"))
    assert reds(pictures) == [7]
    assert pictures.name(0) == f"{tmp_path}/s.tar/{name}"


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ((b"10", b"9\n", b"10"), ["9", "10"], [1, 0, 1]),
        ((b"dog", b"cat", b"ant"), ["ant", "cat", "dog"], [2, 1, 0]),
    ],
)
def test_labels_are_those_of_the_same_key_in_the_same_shard(
    tmp_path: Path, labels: tuple[bytes, bytes, bytes], classes: list[str], expected: list[int]
) -> None:
    write(tmp_path / "0.tar", {"k.cls": labels[0], "k.v2.png": png(0), "l.png": png(1), "l.cls": labels[1]})
    write(tmp_path / "1.tar", {"k.png": png(2), "k.cls": labels[2]})
    pictures = open_pictures(str(tmp_path))
    assert (pictures.classes, pictures.labels) == (classes, expected)


def test_other_pictures_of_a_sample_are_left_out(tmp_path: Path) -> None:
    files = {
        "1.seg.png": png(0),
        "1.png": png(1),
        "1.PNG": png(2),
        "1.cls": b"a",
        "2.png": png(3),
        "2.cls": b"b",
    }
    write(tmp_path / "0.tar", files)
    write(tmp_path / "1.tar", {"1.png": png(4), "1.cls": b"a"})
    pictures = open_pictures(str(tmp_path))
    assert (reds(pictures), pictures.labels) == ([1, 3, 4], [0, 1, 0])


def test_dots_in_the_names_of_photographs_lose_none(tmp_path: Path) -> None:
    files = {"at 10.30.12.png": png(0), "at 10.30.15.png": png(1), "b/10.30.png": png(2)}
    assert reds(open_pictures(str(write(tmp_path / "0.tar", files)))) == [0, 1, 2]


def test_a_hard_link_is_the_file_that_it_links_to(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", {".a.png": png(5), "b.png": png(6)})
    add_link(shard, "c.png", ".a.png")
    add_link(shard, "d.png", "c.png")
    pictures = open_pictures(str(shard))
    assert reds(pictures) == [6, 5, 5]
    assert pictures.name(2) == f"{shard}/d.png"


def test_a_hard_link_to_nothing_is_refused(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", {"a.png": png(0)})
    add_link(shard, "b.png", "gone.png")
    sentence = f"shard {shard}: b.png is a hard link to gone.png, which is not before it: make it again"
    refused(shard, re.escape(sentence))


def test_joined_archives_are_refused(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{number}.tar", {"a.png": png(number)}) for number in range(2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    sentence = f"shard {joined} goes on after its end, as joined archives do: make one archive of them"
    refused(joined, re.escape(sentence))


def test_zeros_after_the_end_are_no_archive(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", {"a.png": png(0)})
    shard.write_bytes(shard.read_bytes() + bytes(3_000_000))
    assert reds(open_pictures(str(shard))) == [0]


def test_shards_are_found_in_subfolders_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    for number, name in enumerate(("1.TAR", "deep/0.tar", "deep/er/0.Tar", "deep/._0.tar")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, {"a.png": png(number)})
    assert reds(open_pictures(str(tmp_path))) == [0, 1, 2]
    assert reds(open_pictures(str(tmp_path / "1.TAR"))) == [0]


def test_a_pattern_for_pictures_and_shards_together_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", {"a.png": png(0)})
    (tmp_path / "b.png").write_bytes(png(1))
    sentence = f"{tmp_path}/* matches 1 pictures and 1 .tar files; give either kind alone"
    refused(tmp_path / "*", re.escape(sentence))


def test_labels_for_some_pictures_only_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", {"k.cls": b"1", "k.png": png(0), "l.png": png(1)})
    refused(tmp_path, r"1 of the 2 pictures in the shards have a label \(\.cls\); give all one or none")


def test_pictures_in_the_folder_come_before_shards(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", {"a.png": png(0)})
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "b.png").write_bytes(png(1))
    assert reds(open_pictures(str(tmp_path))) == [1]


def test_a_pickled_copy_reads_the_same(shards: Path) -> None:
    pictures = open_pictures(str(shards))
    assert pictures.picture(0).size == (4, 3)
    assert reds(pickle.loads(pickle.dumps(pictures))) == list(range(24))


def test_a_broken_member_is_named(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(stream, "PNG")
    pictures = open_pictures(
        str(write(tmp_path / "s.tar", {"a.png": stream.getvalue()[:200], "b.png": b"", "c.png": png(1)}))
    )
    with pytest.raises(
        BrokenImageError, match=re.escape(f"{tmp_path}/s.tar/a.png: truncated after 200 bytes")
    ):
        pictures.picture(0)
    with pytest.raises(BrokenImageError, match=re.escape(f"{tmp_path}/s.tar/b.png: empty file")):
        pictures.picture(1)
    (tmp_path / "s.tar").write_bytes(b"")
    with pytest.raises(BrokenImageError, match=re.escape("c.png: its shard became shorter since the start")):
        pictures.picture(2)


@pytest.mark.parametrize("cut", [100, 600, 1100, 1600])
def test_a_cut_shard_is_named_and_nothing_is_read_from_it(tmp_path: Path, cut: int) -> None:
    shard = write(tmp_path / "s.tar", {"a.png": png(0), "b.png": png(1)})
    shard.write_bytes(shard.read_bytes()[:cut])
    refused(
        shard,
        rf"shard {re.escape(str(shard))} is damaged after \d files \(.+\): make it again or leave it out",
    )


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    shard = write(tmp_path / "s.tar", {"a.png": png(0), "b.png": png(1), "c.png": png(2)})
    content = bytearray(shard.read_bytes())
    content[1024:1034] = b"\x01" * 10
    shard.write_bytes(content)
    refused(
        shard,
        rf"shard {re.escape(str(shard))} is damaged after 1 files \(bad header\): make it again or leave it out",
    )


def test_compressed_shards_are_refused_whatever_their_name(tmp_path: Path) -> None:
    shard = write(tmp_path / "s.tar", {"a.png": png(0)})
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    refused(
        shard,
        rf"shard {re.escape(str(shard))} is compressed, and pictures are read from any place in it: "
        "uncompress it first",
    )


def test_shards_without_pictures_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", {"a.txt": b"text"})
    write(tmp_path / "1.tar", {})
    refused(tmp_path, rf"no pictures in 2 shards, {re.escape(str(tmp_path))}/0\.tar the first; .* are read")
    refused(tmp_path / "0.tar", r"no pictures in 1 shards, .*")


def test_pictures_are_equal_to_those_of_webdatasets_own_layout(tmp_path: Path) -> None:
    """Read with nothing but tarfile, the naive way."""
    shard = write(tmp_path / "s.tar", {"a.jpg": png(3), "b.png": png(4)})
    pictures = open_pictures(str(shard))
    with tarfile.open(shard) as tar:
        for index, member in enumerate(tar.getmembers()):
            assert np.array_equal(Image.open(tar.extractfile(member)), pictures.picture(index))
