"""Which pictures lie where in tar shards, and their labels: what the headers say, and nothing that they point to.

A shard is never unpacked. Only its regular files are read, by their place inside of it: links to files, devices and
whatever else a header may be are passed over, and a hard link stands for a file before it in the same shard.
"""

import hashlib
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
from tqdm import tqdm

from dino.runtime.file_index import Arrays, Watch
from dino.runtime.images import is_picture_name, suffixes
from dino.runtime.names import Names, Packing
from dino.runtime.options import UserError
from dino.runtime.pictures import number_classes

_LABEL_SUFFIX = ".cls"
_LONGEST_LABEL = 1 << 16  # bytes; more than a name or a number is a mistake, or meant to fill the memory

# How gzip, bzip2, xz and Zstandard files begin.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

_NONE = -1

Array: TypeAlias = np.ndarray[Any, Any]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Members:
    """The pictures in shards, possibly none, in the order of the shards and of the files in them.

    Attributes:
        names: within the shard.
        shards: (n,) int32, the number of each one's shard.
        offsets, sizes: (n,) int64 in bytes, where in the shard it is.
        labels: (n,) int32; empty where there are no classes.
        classes: their names, by label.
    """

    names: Names
    shards: Array
    offsets: Array
    sizes: Array
    labels: Array
    classes: Names

    def arrays(self) -> Arrays:
        names, ends = self.names.arrays()
        classes, class_ends = self.classes.arrays()
        packed = {"names": names, "ends": ends, "classes": classes, "class_ends": class_ends}
        places = {"shards": self.shards, "offsets": self.offsets, "sizes": self.sizes, "labels": self.labels}
        return {**packed, **places}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> "Members":
        return cls(
            names=Names.from_arrays((arrays["names"], arrays["ends"])),
            classes=Names.from_arrays((arrays["classes"], arrays["class_ends"])),
            **{key: arrays[key] for key in ("shards", "offsets", "sizes", "labels")},
        )


class ShardSearch:
    """Reads through all headers; see `file_index.Search`. What it finds are the arrays of `Members`.

    Raises:
        UserError: a shard cannot be indexed, or some pictures have a label and others none.
    """

    def __init__(self, shards: Sequence[Path], *, quiet: bool) -> None:
        self.rules = f"pictures {sorted(suffixes())}"  # another Pillow may read others
        self.watch = Watch()
        self._shards = shards
        self._quiet = quiet
        self._names = Packing()
        self._places = {"shards": array("i"), "offsets": array("q"), "sizes": array("q")}
        self._texts: dict[str, int] = {}  # of labels, numbered as they come
        self._labels = array("i")

    def steps(self) -> Iterator[None]:
        total = sum(shard.stat().st_size for shard in self._shards)
        done = 0
        with tqdm(
            total=total,
            desc="indexing shards",
            unit="B",
            unit_scale=True,
            delay=2,
            leave=False,
            disable=self._quiet,
        ) as bar:
            for number, path in enumerate(self._shards):
                self.watch.look(path)
                shard = _Shard(path, self._texts)
                for end in shard.read():
                    bar.update(done + end - bar.n)
                    yield
                self._take(number, shard)
                done += path.stat().st_size

    def _take(self, number: int, shard: "_Shard") -> None:
        names = shard.names.names()
        for place, label in zip(shard.chosen().data, shard.labels().data, strict=True):
            self._names.add(names[place])
            self._places["shards"].append(number)
            self._places["offsets"].append(shard.offsets[place])
            self._places["sizes"].append(shard.sizes[place])
            self._labels.append(label)

    def found(self) -> Arrays:
        count = len(self._names)
        labelled = count - self._labels.count(_NONE)
        if 0 < labelled < count:
            raise UserError(
                f"{labelled} of the {count} pictures in the shards have a label ({_LABEL_SUFFIX}); "
                "give all one or none"
            )
        texts = list(self._texts)
        classes, labels = number_classes(
            [texts[label] for label in self._labels if label != _NONE], by_value=True
        )
        return Members(
            names=self._names.names(),
            labels=np.array(labels or [], np.int32),
            classes=Names.of(classes),
            **{key: np.array(values) for key, values in self._places.items()},
        ).arrays()


class _Shard:
    """The files of one shard, and which of them are pictures and labels.

    Args:
        texts: numbers of the labels of all shards by their text, to which it adds.
    """

    def __init__(self, path: Path, texts: dict[str, int]) -> None:
        self._path = path
        self._texts = texts
        self.names, self.offsets, self.sizes = Packing(), array("q"), array("q")
        self._place_of: dict[str, int] | None = None  # only once a hard link asks for a name
        self._pictures, self._samples, self._plain = array("q"), array("q"), array("b")
        self._labelled_samples, self._labels = array("q"), array("q")

    def read(self) -> Iterator[int]:
        """Go through the shard; yields how many bytes are behind."""
        with self._path.open("rb") as stream:
            for header in _headers(self._path, stream):
                self._add(header, stream)
                yield header.offset_data + header.size

    def _add(self, header: tarfile.TarInfo, stream: BinaryIO) -> None:
        if header.isreg() and not header.issparse():
            offset, size = header.offset_data, header.size
        elif header.islnk():
            offset, size = self._linked(header)
        else:
            return
        name = header.name
        if ".." in PurePath(name).parts or PurePath(name).anchor or "\0" in name:
            raise UserError(
                f"shard {self._path}: the file {name!r} would be outside of the folder that it is unpacked in: "
                "make it again, with paths that have no '..' and do not begin at the root"
            )
        place = len(self.names)
        self.names.add(name)
        self.offsets.append(offset)
        self.sizes.append(size)
        if self._place_of is not None:
            self._place_of[name] = place
        folder, slash, file = name.rpartition("/")
        if file.startswith("."):
            return
        sample = folder + slash + file.partition(".")[0]
        if is_picture_name(name):
            self._pictures.append(place)
            self._samples.append(_number(sample))
            self._plain.append(file.count(".") == 1)
        elif name.endswith(_LABEL_SUFFIX):
            if size > _LONGEST_LABEL:
                raise UserError(f"shard {self._path}: {name} is no label but {size:,} bytes: make it again")
            stream.seek(offset)
            text = stream.read(size).decode(errors="replace").strip()
            self._labelled_samples.append(_number(sample))
            self._labels.append(self._texts.setdefault(text, len(self._texts)))

    def _linked(self, link: tarfile.TarInfo) -> tuple[int, int]:
        if self._place_of is None:
            self._place_of = {name: place for place, name in enumerate(self.names.names())}
        place = self._place_of.get(link.linkname)
        if place is None:
            raise UserError(
                f"shard {self._path}: {link.name} is a hard link to {link.linkname}, which is not before it: "
                "make it again"
            )
        return self.offsets[place], self.sizes[place]

    def _kept(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Without those beside a `key.jpg`; where a sample has none, its names may just hold dots, and all stay."""
        plain = np.flatnonzero(np.array(self._plain, bool))
        samples = np.array(self._samples, np.int64)
        plain_one = _first_value(samples, samples[plain], plain)
        return (plain_one == _NONE) | (plain_one == np.arange(len(samples)))

    def chosen(self) -> Integers:
        """Which of the files are the pictures to read."""
        return np.array(self._pictures, np.int64)[self._kept()]

    def labels(self) -> Integers:
        """Numbers of the chosen pictures' labels, -1 where there is none; of several for one sample, the last."""
        samples = np.array(self._samples, np.int64)[self._kept()]
        known, labels = np.array(self._labelled_samples, np.int64), np.array(self._labels, np.int64)
        return _first_value(samples, known[::-1], labels[::-1])


def _number(sample: str) -> int:
    """64 well-mixed bits for what the names of one sample share, a third of the memory of a set of the names."""
    digest = hashlib.blake2b(sample.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _first_value(keys: Integers, known: Integers, values: Integers) -> Integers:
    """For each of `keys`, the value that stands at its first place in `known`; -1 where it is not there."""
    found = np.full(len(keys), _NONE, np.int64)
    if len(known):
        distinct, first = np.unique(known, return_index=True)
        place = np.minimum(np.searchsorted(distinct, keys), len(distinct) - 1)
        is_there = distinct[place] == keys
        found[is_there] = values[first[place[is_there]]]
    return found


def _headers(shard: Path, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    count = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for header in tar:
                if header.size < 0:  # the next header would be one that has been
                    raise tarfile.ReadError("a size below 0")
                yield header
                count += 1
                cast(Any, tar).members = []  # it would keep all of them: a gigabyte for a million
            _check_end(tar, shard)
    except tarfile.TarError as error:
        stream.seek(0)
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
