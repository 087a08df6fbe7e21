"""Writing files that a user asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dino.runtime.options import UserError


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
