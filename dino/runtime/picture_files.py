"""Pictures that are files of their own: found in a folder, or named in a list."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL.Image import Image
from tqdm import tqdm

from dino.runtime.distributed import is_main
from dino.runtime.images import decode, is_picture_name
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, number_classes

_PATH_COLUMNS = {"path", "image", "file", "filename"}
_CLASS_COLUMNS = {"label", "class"}


class PictureFiles(Pictures):
    """Pictures at `paths`, relative to `root`."""

    def __init__(
        self, root: Path, paths: Sequence[str], classes: Sequence[str] = (), labels: list[int] | None = None
    ) -> None:
        self._root = root
        self._paths = list(paths)
        self.classes = list(classes)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return os.fsencode(self._root / self._paths[index]).decode(errors="replace")

    def picture(self, index: int, *, at_least: int | None = None) -> Image:
        return decode(self._root / self._paths[index], self.name(index), at_least=at_least)


def pictures_in(folder: Path) -> PictureFiles:
    """Every picture in the folder and below, possibly none.

    Where all lie in two or more immediate subfolders, these are the classes.
    """
    files = tqdm(files_in(folder), f"files in {folder}", unit="", delay=2, leave=False, disable=not is_main())
    paths = [path for path in files if is_picture_name(path)]
    if all(os.sep in path for path in paths):
        return PictureFiles(folder, paths, *number_classes([path.split(os.sep, 1)[0] for path in paths]))
    return PictureFiles(folder, paths)


def files_in(folder: Path) -> Iterator[str]:
    """Paths, relative to the folder, of the files in it and below, in alphabetical order; none hidden.

    Links to folders are followed, but not into a folder that they lie in.
    """
    return _files_in(folder, "", frozenset())


def _files_in(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    identity = folder.stat()
    here = (identity.st_dev, identity.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        visible = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    yield from (prefix + name for name, is_folder in visible if not is_folder)
    for name, is_folder in visible:
        if is_folder:
            yield from _files_in(folder / name, f"{prefix}{name}{os.sep}", above | {here})


def read_list(file: Path) -> PictureFiles:
    """The pictures that a `.txt` or `.csv` names, relative to its folder. They are not looked for.

    Raises:
        UserError: it is not text, names no pictures, or gives a class to some but not to all.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = _csv_rows(csv.reader(lines)) if file.suffix.lower() == ".csv" else _text_rows(lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is not a list of pictures in UTF-8 text: {error}") from error
    if not rows:
        raise UserError(f"{file} lists no pictures: it takes one path per line, then optionally a class")
    with_class = [class_name for _, class_name in rows if class_name]
    if 0 < len(with_class) < len(rows):
        raise UserError(
            f"{file} gives a class to {len(with_class)} of its {len(rows)} pictures; give all one or none"
        )
    return PictureFiles(file.parent, [path for path, _ in rows], *number_classes(with_class, by_value=True))


def _text_rows(lines: Iterator[str]) -> list[tuple[str, str]]:
    columns = (line.strip("\r\n").partition("\t") for line in lines)
    return [(path.strip(), class_name.strip()) for path, _, class_name in columns if path.strip()]


def _csv_rows(lines: Iterator[list[str]]) -> list[tuple[str, str]]:
    """Path and class, "" when there is none: the first two columns, unless a header names others."""
    rows = [[cell.strip() for cell in line] for line in lines if any(cell.strip() for cell in line)]
    columns = [0, 1]
    header = [cell.lower() for cell in rows[0]] if rows else []
    if not _PATH_COLUMNS.isdisjoint(header):
        rows = rows[1:]
        columns = [
            next((column for column, cell in enumerate(header) if cell in names), len(header))
            for names in (_PATH_COLUMNS, _CLASS_COLUMNS)
        ]
    cells = [[row[column] if column < len(row) else "" for column in columns] for row in rows]
    return [(path, class_name) for path, class_name in cells if path]
