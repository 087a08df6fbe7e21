"""Pictures inside tar files, in the layout of WebDataset, read in any order like files in a folder.

The headers are read once, at the start; after that a picture costs one seek. So the order and an exact resume
are those of a folder, at the price of reading through the headers of every shard.
"""

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from PIL.Image import Image
from tqdm import tqdm

from dino.runtime.distributed import is_main
from dino.runtime.images import BrokenImageError, decode, is_picture_name, reading
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, number_classes

_LABEL_SUFFIX = ".cls"

# How gzip, bzip2, xz and Zstandard files begin.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class _Member(NamedTuple):
    shard: int
    name: str
    offset: int
    size: int


class TarPictures(Pictures):
    """The pictures in the shards, possibly none, in the order of the shards and of their members.

    Labels are those of `key.cls` beside `key.jpg`, when every picture has one. Other pictures beside `key.jpg`,
    such as `key.seg.png` or `key.png`, are left out.

    Raises:
        UserError: a shard cannot be indexed, or some pictures have a label and others none.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        self._changed = [shard.stat().st_mtime_ns for shard in self._shards]
        pictures: list[_Member] = []
        names = {}
        for member in _index(self._shards):
            if is_picture_name(member.name):
                pictures.append(member)
            elif member.name.endswith(_LABEL_SUFFIX):
                names[_key(member)] = _read(self._shards, member).decode(errors="replace").strip()
        self._pictures = _one_of_each_sample(pictures)
        labelled = [names[_key(picture)] for picture in self._pictures if _key(picture) in names]
        if 0 < len(labelled) < len(self._pictures):
            raise UserError(
                f"{len(labelled)} of the {len(self._pictures)} pictures in the shards have a label "
                f"({_LABEL_SUFFIX}); give all one or none"
            )
        self.classes, self.labels = number_classes(labelled, by_value=True)

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, index: int) -> str:
        picture = self._pictures[index]
        return f"{self._shards[picture.shard]}/{picture.name}".encode(errors="replace").decode()

    def picture(self, index: int, *, at_least: int | None = None) -> Image:
        name = self.name(index)
        with reading(name):
            content = _read(self._shards, self._pictures[index])
        return decode(io.BytesIO(content), name, at_least=at_least, as_stored=self.as_stored)

    def stamp(self, index: int) -> tuple[str, int, int]:
        member = self._pictures[index]
        name = f"{self._shards[member.shard].name}/{member.name}".encode(errors="replace").decode()
        return name, member.size, self._changed[member.shard]


def _read(shards: Sequence[Path], member: _Member) -> bytes:
    # Opened for every read: an open file can be neither pickled for a worker nor shared by forked ones.
    with shards[member.shard].open("rb") as stream:
        stream.seek(member.offset)
        content = stream.read(member.size)
    if len(content) < member.size:
        raise BrokenImageError(member.name, "its shard became shorter since the start")
    return content


def _key(member: _Member) -> tuple[int, str]:
    """What the files of one sample share: the shard, and the name up to the first dot after the folders."""
    folder, slash, file = member.name.rpartition("/")
    return member.shard, folder + slash + file.partition(".")[0]


def _one_of_each_sample(pictures: Sequence[_Member]) -> list[_Member]:
    """Without those beside a `key.jpg`; where a sample has none, its names may just hold dots, and all stay."""
    plain: dict[tuple[int, str], _Member] = {}
    for picture in pictures:
        if picture.name.rpartition("/")[2].count(".") == 1:
            plain.setdefault(_key(picture), picture)
    return [picture for picture in pictures if plain.get(_key(picture), picture) is picture]


def _index(shards: Sequence[Path]) -> Iterator[_Member]:
    """Every visible file in the shards, also under the other names that hard links give it."""
    total = sum(shard.stat().st_size for shard in shards)
    done = 0
    quiet = not is_main()
    with tqdm(
        total=total, desc="indexing shards", unit="B", unit_scale=True, delay=2, leave=False, disable=quiet
    ) as bar:
        for number, shard in enumerate(shards):
            files: dict[str, _Member] = {}
            for header in _headers(shard):
                bar.update(done + header.offset_data + header.size - bar.n)
                if header.isreg() and not header.issparse():
                    files[header.name] = _Member(number, header.name, header.offset_data, header.size)
                elif header.islnk():
                    files[header.name] = _linked(files, header, shard)
                else:
                    continue
                if not header.name.rpartition("/")[2].startswith("."):
                    yield files[header.name]
            done += shard.stat().st_size


def _linked(files: Mapping[str, _Member], link: tarfile.TarInfo, shard: Path) -> _Member:
    if link.linkname not in files:
        raise UserError(
            f"shard {shard}: {link.name} is a hard link to {link.linkname}, which is not before it: make it again"
        )
    return files[link.linkname]._replace(name=link.name)


def _headers(shard: Path) -> Iterator[tarfile.TarInfo]:
    count = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for header in tar:
                yield header
                count += 1
                cast(Any, tar).members = []  # it would keep all of them: a gigabyte for a million
            _check_end(tar, shard)
    except tarfile.TarError as error:
        with shard.open("rb") as stream:
            compressed = stream.read(6).startswith(_COMPRESSED)
        problem = (
            "is compressed, and pictures are read from any place in it: uncompress it first"
            if compressed
            else f"is damaged after {count} files ({error}): make it again or leave it out"
        )
        raise UserError(f"shard {shard} {problem}") from error


def _check_end(tar: tarfile.TarFile, shard: Path) -> None:
    """tarfile takes a damaged header for the end of the archive; the real end is zeros, up to that of the file."""
    stream = cast(BinaryIO, tar.fileobj)
    stream.seek(tar.offset)
    if any(stream.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError("bad header")
    while rest := stream.read(1 << 20):
        if rest.strip(b"\0"):
            raise UserError(
                f"shard {shard} goes on after its end, as joined archives do: make one archive of them"
            )
