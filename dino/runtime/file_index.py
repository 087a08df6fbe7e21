"""What takes long to find, the files of a folder or the members of shards, kept for the next start.

An index is a file in the user's cache folder. Beside what was found it holds every folder and file that was looked
into, and a checksum of their inodes, sizes and times: it is used while all of these are what they were. Where it
cannot be written, read or trusted, the search is simply made again.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from filelock import FileLock, Timeout

from dino.runtime.files import write_atomically
from dino.runtime.names import Names, Packing
from dino.runtime.options import UserError

Arrays: TypeAlias = Mapping[str, np.ndarray[Any, Any]]

_FORMAT = 1

# Seconds that a search may take without its result being kept. Time and not a number of files: on a network's disk
# a few thousand take as long as a million here.
_QUICK = 1.0

# Nanoseconds within which two changes can leave the same time: the coarsest clock of a file system, FAT's.
_TICK = 2_000_000_000

_PATIENCE = 7200.0  # seconds to wait for another process, which may hang
_MOST_KEPT = 16  # indexes; one of a million files takes some 50 MB


class Watch:
    """The state of folders and files, by which a later look tells whether anything has changed there.

    Whatever is added to a folder, removed or renamed changes the folder's times.

    Attributes:
        certain: whether every later change will show. It may not where the last one is so recent that another could
            bear the same time, nor where there are no times.
    """

    def __init__(self) -> None:
        self.certain = True
        self._paths = Packing()
        self._states = hashlib.sha256(str(_FORMAT).encode())

    def look(self, path: str | os.PathLike[str]) -> os.stat_result | None:
        """The state of what `path` leads to, links followed; None where that is nothing."""
        now = time.time_ns()
        try:
            state = os.stat(path)  # noqa: PTH116 - of a million files, without an object for each
        except OSError:
            state = None
        self._paths.add(os.path.abspath(path))  # noqa: PTH100 - the same, and links are kept
        if state is None:
            self._states.update(b"nothing")
            return None
        # No device: its number differs from host to host, and from boot to boot, for one and the same network disk.
        # ctime: unlike mtime it cannot be set back, as by a program that unpacks files.
        times = (state.st_mtime_ns, state.st_ctime_ns)
        self._states.update(repr((state.st_ino, state.st_size, *times)).encode())
        self.certain &= 0 < max(times) < now - _TICK
        return state

    def arrays(self) -> Arrays:
        paths, ends = self._paths.names().arrays()
        states = np.frombuffer(self._states.digest(), np.uint8)
        return {"watched": paths, "watched_ends": ends, "states": states}


class Search(Protocol):
    """Something to be found that may take long.

    Attributes:
        rules: what the result depends on beside the files.
        watch: has looked at all of them, at each before its content was read.
    """

    rules: str
    watch: Watch

    def steps(self) -> Iterator[object]:
        """Do the work, a little at a time."""

    def found(self) -> Arrays:
        """The result, after the last step."""


def indexed(subject: Sequence[Path], search: Search) -> Arrays:
    """What the search finds, or has found before if nothing has changed since.

    Of several processes that need the same at once, one makes a long search and the others wait for it.

    Args:
        subject: the folder or the files that are searched.
    """
    place = _place(subject, search.rules)
    if place is None:
        return _finished(search.steps(), search)
    kept = _read(place)
    if kept is not None:
        return kept
    steps = search.steps()
    began = time.monotonic()
    for _ in steps:
        if time.monotonic() - began > _QUICK:
            break
    else:
        return search.found()
    with _alone(place) as may_write:
        kept = _read(place)  # another process may have written it since the first look
        if kept is not None:
            return kept
        found = _finished(steps, search)
        if may_write and search.watch.certain:
            _write(place, {**found, **search.watch.arrays()})
        return found


def _finished(steps: Iterator[object], search: Search) -> Arrays:
    for _ in steps:
        pass
    return search.found()


def _place(subject: Sequence[Path], rules: str) -> Path | None:
    """The index's file; None where the user has no cache folder.

    Copies of a folder on the disks of several hosts, whose users' home is one, have one each: their inodes differ.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            return None
    identity = repr((rules, [(str(path.resolve()), path.stat().st_ino) for path in subject]))
    name = hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()[:32]
    return cache / "dino-xcit" / "indexes" / f"{name}.npz"


@contextmanager
def _alone(place: Path) -> Iterator[bool]:
    """Whether this process may write the index; if not, it goes on when the one that may is done."""
    lock = FileLock(place.with_suffix(".lock"))
    mine = _taken(lock)
    try:
        yield mine
    finally:
        if mine:
            lock.release()


def _taken(lock: FileLock) -> bool:
    """False where no lock can be had, or, after it is free again, where another process had it."""
    try:
        Path(lock.lock_file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        return True
    except Timeout:
        # All that waited go on together: if the other left no index, none can be kept.
        with suppress(Timeout, OSError):
            lock.acquire(timeout=_PATIENCE)
            lock.release()
    except (OSError, NotImplementedError):
        pass
    return False


def _read(place: Path) -> Arrays | None:
    """What is kept there; None if there is nothing, it is damaged, or something it was made from has changed."""
    try:
        if hasattr(os, "getuid") and place.stat().st_uid != os.getuid():
            return None  # it could name any file as a picture
        with place.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        now = Watch()
        for path in Names.from_arrays((arrays["watched"], arrays["watched_ends"])):
            now.look(path)
        if now.arrays()["states"].tobytes() != arrays["states"].tobytes():
            return None
    except Exception:  # on damaged bytes the decoders of zip and npy raise nearly anything
        return None
    with suppress(OSError):
        os.utime(place)  # those in use stay longest
    return arrays


def _write(place: Path, arrays: Arrays) -> None:
    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **dict[str, Any](arrays))

    with suppress(UserError, OSError):
        write_atomically(place, save)
        by_use = sorted(place.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
        for file in by_use[:-_MOST_KEPT]:
            file.unlink()
