"""Files that a user names, and writing them."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dino.runtime.options import UserError


def expanded(place: str, option: str) -> Path:
    """A path that a user names, with `~` resolved.

    Args:
        option: what it is named with, such as `--output_dir`.

    Raises:
        UserError: nobody has such a home.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise UserError(f"{option} {place}: there is no such user, whose home ~ would be") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, a missing right and the like become a sentence that names the file.

    Raises:
        UserError: what is done in here failed to write.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` and rename: `path` holds the old content or the new, whole.

    Args:
        write: writes the new content to the temporary path that it gets.

    Raises:
        UserError: the disk is full, the folder cannot be written or the like; `path` is unchanged.
    """
    # The same name every time, so that what a killed writer leaves behind is overwritten and does not pile up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # On a full disk torch's writer raises a RuntimeError of its own over the system's error.
        hidden = error.__context__ if isinstance(error, RuntimeError) else None
        reason = hidden if isinstance(hidden, OSError) else error
        raise UserError(f"cannot write {path}: {reason}; what was there before is unchanged") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def make_writable(folder: Path, option: str) -> None:
    """Make the folder where it is missing and try a file in it: asked before long work, so that none is lost.

    Args:
        option: what the user named the folder with, such as `--output_dir`.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {option} {folder}: {error.strerror or error}; name another folder"
        ) from error


def check_room(folder: Path, needed: int, what: str, option: str) -> None:
    """Find out before long work that its files fit.

    Args:
        needed: bytes.
        what: what needs them, in the plural.
        option: what the user names the folder with.

    Raises:
        UserError: the disk of the folder has fewer left.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what} need {_size(needed)} in {folder}, where {_size(free)} are free; name another folder with {option}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
