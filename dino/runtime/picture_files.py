"""Pictures that are files of their own: found in a folder or by a pattern, or named in a list."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from glob import escape, glob, has_magic
from itertools import chain
from pathlib import Path

from PIL.Image import Image
from tqdm import tqdm

from dino.runtime.images import decode, is_picture_name
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, number_classes

_PATH_COLUMNS = ("path", "file", "file_name", "filename", "image", "image_path", "img")
_CLASS_COLUMNS = ("class", "label", "class_id", "category", "class_name")
_SEPARATORS = ",;\t"

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


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
        path = self._root / self._paths[index]
        return decode(path, self.name(index), at_least=at_least, as_stored=self.as_stored)

    def stamp(self, index: int) -> tuple[str, int, int]:
        name = os.fsencode(self._paths[index]).decode(errors="replace")
        try:
            file = (self._root / self._paths[index]).stat()
        except OSError:  # a link that leads nowhere
            return name, 0, 0
        return name, file.st_size, file.st_mtime_ns


def pictures_in(folder: Path) -> PictureFiles:
    """Every picture in the folder and below, possibly none.

    Where all lie in two or more immediate subfolders, these are the classes.
    """
    from dino.runtime.distributed import is_main  # torch, without which files can be found

    files = tqdm(files_in(folder), f"files in {folder}", unit="", delay=2, leave=False, disable=not is_main())
    paths = [path for path in files if is_picture_name(path)]
    if all(os.sep in path for path in paths):
        return PictureFiles(folder, paths, *number_classes([path.split(os.sep, 1)[0] for path in paths]))
    return PictureFiles(folder, paths)


def files_in(folder: Path) -> Iterator[str]:
    """Paths, relative to the folder, of the files in it and below, in alphabetical order; none hidden.

    Links to folders are followed, but not into a folder that they lie in. Pipes and devices are no files.
    """
    return _files_in(folder, "", frozenset())


def _files_in(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    identity = folder.stat()
    here = (identity.st_dev, identity.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    yield from sorted(prefix + entry.name for entry in visible if _is_file(entry))
    for name in sorted(entry.name for entry in visible if _is_folder(entry)):
        yield from _files_in(folder / name, f"{prefix}{name}{os.sep}", above | {here})


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: "os.DirEntry[str] | Path") -> bool:
    """Whether it is a regular file, or a link that leads nowhere: whoever reads that one learns why."""
    try:
        return entry.is_file() or (entry.is_symlink() and not Path(entry).exists())
    except OSError:
        return True


def is_pattern(path: str) -> bool:
    return has_magic(path) or _BRACES.search(path) is not None


def files_matching(pattern: str) -> list[str]:
    """The files that a pattern such as `photos/**/*.jpg` or `{a,b}/[0-9]?.png` stands for.

    In the order of the braces, and for each in alphabetical order. As in `glob`, what is hidden is found only by
    a pattern that names the dot; unlike there, `**` follows no links to folders, which may lead in circles.

    Raises:
        UserError: braces name a file that does not exist.
    """
    files: list[str] = []
    for part in _expand_braces(pattern):
        if has_magic(part):
            files += sorted({str(match) for match in map(Path, _matches(Path(part))) if _is_file(match)})
        elif Path(part).exists():
            files.append(part)
        else:
            raise UserError(f"{part}, which {pattern} stands for, does not exist")
    return files


def _matches(pattern: Path) -> Iterator[str]:
    if "**" not in pattern.parts:
        yield from glob(str(pattern))  # noqa: PTH207 - Path.glob takes no absolute pattern, and finds hidden files
        return
    place = pattern.parts.index("**")
    rest = pattern.parts[place + 1 :] or ("*",)
    for top in _matches(Path(*pattern.parts[:place])):
        for folder, subfolders, _ in os.walk(top):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            yield from _matches(Path(escape(folder), *rest))


def _expand_braces(pattern: str) -> list[str]:
    """`a{08..10}` to a08, a09, a10 and `a{b,c}` to ab, ac, as a shell does; several in one pattern too."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, last, words = braces.groups()
    if words is not None:
        choices = words.split(",")
    else:
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rest = _expand_braces(pattern[braces.end() :])
    return [pattern[: braces.start()] + choice + tail for choice in choices for tail in rest]


def read_list(file: Path) -> PictureFiles:
    """The pictures that a `.txt` or `.csv` names, relative to its folder. They are not looked for.

    Raises:
        UserError: it is not text, names no pictures, or gives a class to some but not to all.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = _csv_rows(lines) if file.suffix.lower() == ".csv" else _text_rows(lines)
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


def _csv_rows(lines: Iterator[str]) -> list[tuple[str, str]]:
    """Path and class, "" when there is none: the first two columns, unless a header names others."""
    first_line = next(lines, "")
    separator = next((character for character in _SEPARATORS if character in first_line), _SEPARATORS[0])
    table = csv.reader(chain([first_line], lines), delimiter=separator)
    rows = [[cell.strip() for cell in row] for row in table if any(cell.strip() for cell in row)]
    header = _columns_by_header(rows[:2])
    rows, columns = (rows[1:], header) if header else (rows, (0, 1))
    cells = [[row[column] if column < len(row) else "" for column in columns] for row in rows]
    return [(path, class_name) for path, class_name in cells if path]


def _columns_by_header(first_rows: list[list[str]]) -> tuple[int, int] | None:
    """The columns of path and class, or None where the first row is no header.

    It is one when it names a column as paths are usually named, or begins with no picture and the next row with
    one; then what it does not name is the first and the second column.
    """
    header = [cell.lower() for cell in first_rows[0]] if first_rows else []
    path, class_name = _column(header, _PATH_COLUMNS), _column(header, _CLASS_COLUMNS)
    if path is not None:
        return path, len(header) if class_name is None else class_name
    if [is_picture_name(row[0]) for row in first_rows] == [False, True]:
        return 0, class_name or 1
    return None


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((column for column, cell in enumerate(header) if cell in names), None)
