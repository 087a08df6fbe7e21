"""Features kept on disk as memory maps, made once for each backbone and set of pictures, by all processes together.

A folder for each: one `.npy` for each kind of feature, `labels.npy`, `names.json`, and `features.json`, which says
what made them and holds the checksum of every file.
"""

import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from dino.evaluation.extraction import Extractor, Features, labels_of, readable
from dino.evaluation.results import versions
from dino.runtime import distributed
from dino.runtime.files import check_room, make_writable, writing
from dino.runtime.fingerprint import Fingerprint
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures
from xcit.download import sha256

_RECORD = "features.json"
_CHECKSUM = "sha256"  # in the record, of the rest of it
_NAMES = "names.json"
_LABELS = "labels.npy"
_ROWS_PER_BLOCK = 4096  # moved at once where broken pictures leave gaps


class _DamagedError(Exception):
    """Why what is there cannot be used."""


@dataclass(frozen=True)
class Origin:
    """The backbone that makes the features.

    Attributes:
        arch: its name.
        backbone_sha256: of its tensors, which decide what the features are.
        weights: where they came from.
        weights_sha256: of that file; None for random weights.
    """

    arch: str
    backbone_sha256: str
    weights: str
    weights_sha256: str | None


def cached_features(
    folder: Path,
    name: str,
    extractor: Extractor,
    pictures: Pictures,
    kinds: Sequence[str],
    *,
    origin: Origin,
    data: Fingerprint,
    say: Callable[[str], None],
) -> Features:
    """The features from `folder`, put there first if they are not, or not whole. To be called by all processes.

    Each process shows the backbone its part of the pictures and writes it into the same files, so the folder must
    be one that all of them see.

    Args:
        folder: holds the features of any number of backbones and sets.
        name: of the set, for messages and the name of its folder.
        say: prints a line.

    Raises:
        UserError: the disk is too small or cannot be written, no picture can be read, or features are not finite.
    """
    key = {
        "backbone_sha256": origin.backbone_sha256,
        "data": data.dated,
        "as_stored": pictures.as_stored,
        **asdict(extractor.preparation),
    }
    what = f"{name} features"
    place = folder / f"{name}-{_sha256_of(key)[:16]}"
    with distributed.together():
        make_writable(folder, "--features_dir")
    with _alone(place, what, say):
        found, wanted = _look(place, kinds, what, say)
        if not found:
            shapes = extractor.row_shapes(wanted)
            with distributed.together():
                if distributed.is_main():
                    _prepare(place, shapes, len(pictures), extractor.preparation.dtype)
            broken = _extract(_temporary(place), extractor, pictures, wanted, what)
            with distributed.together():
                if distributed.is_main():
                    _finish(place, pictures, broken, wanted, {"key": key, "made_by": asdict(origin)})
        # In here: who comes next may put other files in the place of these.
        with distributed.together():
            return _open(place, pictures, kinds)


def _temporary(place: Path) -> Path:
    return place.with_name(f".{place.name}.tmp")


def _sha256_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextmanager
def _alone(place: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Two evaluations at the same time make the features once; one that fails leaves no half-made files behind."""
    if not distributed.is_main():
        yield
        return
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{what}: waiting for another evaluation, which makes them in {place}")
        lock.acquire()
    try:
        yield
    finally:
        shutil.rmtree(_temporary(place), ignore_errors=True)
        lock.release()


def _look(
    place: Path, kinds: Sequence[str], what: str, say: Callable[[str], None]
) -> tuple[bool, tuple[str, ...]]:
    """Whether everything is there, and, if not, the kinds to extract: what is there besides is kept."""
    answer: list[tuple[bool, tuple[str, ...]]] = []
    if distributed.is_main():
        wanted = tuple(kinds)
        try:
            record = _read_record(place)
            stored = tuple(kind for kind in record["kinds"] if kind not in wanted)
            lacking = [kind for kind in wanted if kind not in record["kinds"]]
            if lacking:
                say(f"{what}: {place} lacks {', '.join(lacking)}: extracting again")
                wanted += stored
            else:
                _check(place, record, kinds)
                made = (
                    f"{record['count']} pictures, by torch {record['versions']['torch']} on {record['date']}"
                )
                say(f"{what}: reused from {place} ({made})")
            answer = [(not lacking, wanted)]
        except FileNotFoundError:
            answer = [(False, wanted)]
        except _DamagedError as reason:
            say(f"{what}: {place} is damaged ({reason}): extracting again")
            answer = [(False, wanted)]
    (agreed,) = distributed.gather(answer)
    return agreed


def _read_record(place: Path) -> dict[str, Any]:
    try:
        record = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        whole = record.pop(_CHECKSUM) == _sha256_of(record)
    except FileNotFoundError:
        if place.exists():
            raise _DamagedError(f"{_RECORD} is missing") from None
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise _DamagedError(f"{_RECORD} is not what was written")
    return dict(record)


def _check(place: Path, record: Mapping[str, Any], kinds: Sequence[str]) -> None:
    for name in (*(f"{kind}.npy" for kind in kinds), _LABELS, _NAMES):
        if name not in record["files"]:
            continue  # a set without labels
        try:
            whole = sha256(place / name) == record["files"][name]
        except OSError as error:
            raise _DamagedError(f"{name}: {error.strerror}") from None
        if not whole:
            raise _DamagedError(f"{name} is not what was written")


def _prepare(place: Path, shapes: Mapping[str, tuple[int, ...]], count: int, dtype: np.dtype[Any]) -> None:
    """Empty files of the full size, so that a full disk is found out now and not in the middle."""
    temporary = _temporary(place)
    needed = sum(count * int(np.prod(shape)) * dtype.itemsize for shape in shapes.values())
    with writing(place):
        shutil.rmtree(temporary, ignore_errors=True)
        check_room(place.parent, needed, f"the features of {count} pictures", "--features_dir")
        temporary.mkdir()
        for kind, shape in shapes.items():
            file = temporary / f"{kind}.npy"
            rows = np.lib.format.open_memmap(file, "w+", dtype, (count, *shape))
            del rows
            # Writing into a map of a file with holes kills the process when the disk is full.
            if hasattr(os, "posix_fallocate"):
                with file.open("rb+") as stream:
                    os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


def _extract(
    folder: Path, extractor: Extractor, pictures: Pictures, kinds: Sequence[str], title: str
) -> dict[int, str]:
    """This process's part of the rows; returns the broken pictures of all parts."""
    rank, processes = distributed.rank(), distributed.world_size()
    part = extractor.part_of(len(pictures), rank, processes)
    if processes > 1:
        title += f", part 1 of {processes}"
    broken: dict[int, str] = {}
    with distributed.together():
        try:
            rows = {kind: np.load(folder / f"{kind}.npy", mmap_mode="r+") for kind in kinds}
        except OSError as error:
            raise UserError(
                f"process {rank} cannot open {folder} ({error.strerror}): all processes must see one --features_dir"
            ) from error
        broken = extractor.fill(rows, pictures, part, progress=title if distributed.is_main() else None)
        for values in rows.values():
            values.flush()
    return dict(distributed.gather(list(broken.items())))


def _finish(
    place: Path,
    pictures: Pictures,
    broken: Mapping[int, str],
    kinds: Sequence[str],
    origin: Mapping[str, Any],
) -> None:
    """Close the gaps of broken pictures, write what belongs beside the rows, and give the folder its name."""
    temporary = _temporary(place)
    kept = readable(pictures, broken)
    labels = labels_of(pictures, kept)
    with writing(place):
        if broken:
            for kind in kinds:
                _close_gaps(temporary / f"{kind}.npy", kept)
        if labels is not None:
            np.save(temporary / _LABELS, labels)
        names = [pictures.name(index) for index in kept]
        (temporary / _NAMES).write_text(json.dumps(names), encoding="utf-8")
        record = {
            **origin,
            "kinds": list(kinds),
            "count": len(kept),
            "classes": pictures.classes,
            "broken": [[index, _reason(pictures, index, message)] for index, message in broken.items()],
            "date": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
            "versions": versions(),
            "files": {file.name: sha256(file) for file in sorted(temporary.iterdir())},
        }
        record[_CHECKSUM] = _sha256_of(record)
        (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)


def _close_gaps(file: Path, kept: np.ndarray) -> None:
    """Move the rows to be kept, whose places rise, up to the front; in the file itself, for want of room for two."""
    rows = np.load(file, mmap_mode="r+")
    for start in range(0, len(kept), _ROWS_PER_BLOCK):
        sources = kept[start : start + _ROWS_PER_BLOCK]
        rows[start : start + len(sources)] = rows[sources]
    rows.flush()
    header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (len(kept), *rows.shape[1:])}
    with file.open("rb+") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        assert stream.tell() == rows.offset, "numpy leaves room for more rows than any file has"
        stream.truncate(rows.offset + len(kept) * rows[:1].nbytes)


def _reason(pictures: Pictures, index: int, message: str) -> str:
    return message.removeprefix(f"{pictures.name(index)}: ")


def _open(place: Path, pictures: Pictures, kinds: Sequence[str]) -> Features:
    """The names are those of today: the pictures may have been moved."""
    try:
        record = _read_record(place)
        broken = {index: f"{pictures.name(index)}: {reason}" for index, reason in record["broken"]}
        kept = readable(pictures, broken)
        return Features(
            rows={kind: np.load(place / f"{kind}.npy", mmap_mode="r") for kind in kinds},
            labels=labels_of(pictures, kept),
            names=[pictures.name(index) for index in kept],
            broken=list(broken.values()),
        )
    except (OSError, _DamagedError) as error:
        raise UserError(
            f"process {distributed.rank()} cannot read {place} ({error}): all processes must see one --features_dir"
        ) from error
