"""One run at a time in a folder."""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dino.runtime.files import writing
from dino.runtime.options import UserError
from dino.runtime.progress import say

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second run away
    fcntl = None  # type: ignore[assignment]

NAME = ".in_use"

# A process does not keep itself out by a POSIX lock.
_mine: set[Path] = set()


@contextmanager
def claimed(folder: Path, option: str, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other runs out of the folder while this process lives; however it ends, the system lets go of it.

    A POSIX lock: it holds on network file systems too, and is not inherited by loading processes that outlive a
    killed run for a moment. It is lost when this process closes the file that it is on, so nobody else here opens it.

    Args:
        option: what the user names the folder with, such as `--output_dir`.
        patience: seconds to wait for another owner to end.

    Raises:
        UserError: another process has claimed the folder, or it cannot be written.
    """
    path = folder.resolve() / NAME
    if path in _mine:
        raise UserError(f"{option} {folder} is in use by this very process: name another folder")
    end = time.monotonic() + patience
    waits = False
    while (file := _locked(path)) is None:
        if time.monotonic() < end:
            if not waits:
                say(f"{option} {folder} is in use by {_owner(path)}: waiting for its end")
            waits = True
            time.sleep(1.0)
            continue
        raise UserError(
            f"{option} {folder} is in use by {_owner(path)}: wait until that run ends, or name another folder"
        )
    with file:
        with writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
        _mine.add(path)
        try:
            yield
        finally:
            _mine.remove(path)
            with suppress(OSError):  # Windows removes no open file
                path.unlink()  # before the lock is let go


def _owner(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip() or "another process"
    except OSError:  # it ended in this moment, or is another user
        return "another process"


def _locked(path: Path) -> TextIO | None:
    """The file, locked; None while another process has it."""
    while True:
        with writing(path):
            file = path.open("a+")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError:  # a file system that has no locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its owner ended, and removed it, after it was opened here
