"""Pictures that are files of their own: found in a folder or by a pattern, or named in a list."""

import csv
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import escape, glob, has_magic
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from dino.runtime.file_index import Arrays, Watch, indexed
from dino.runtime.images import decode, is_picture_name, suffixes
from dino.runtime.names import Names, Packing
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, labels_from, number_classes

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
        self._paths = paths if isinstance(paths, Names) else Names.of(paths)
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


def pictures_below(folder: Path) -> tuple[PictureFiles, Names]:
    """Every picture in the folder and below, possibly none, and all other files that `files_in` yields.

    Where the pictures lie in two or more immediate subfolders, these are the classes. What took long to find is taken
    from an index the next time, if no folder has changed since. That cannot be told of links to files that lead to
    folders later, nor of a mount that keeps no time of its folders' last change, as of some object stores.
    """
    from dino.runtime.distributed import is_main  # torch, without which files can be found

    found = indexed([folder], _FolderSearch(folder, quiet=not is_main()))
    names, others, classes = (
        Names.from_arrays((found[part], found[f"{part}_ends"])) for part in ("names", "others", "classes")
    )
    return PictureFiles(folder, names, list(classes), labels_from(found["labels"])), others


def files_in(folder: Path) -> Iterator[str]:
    """Paths, relative to the folder, of the files in it and below, in alphabetical order; none hidden.

    Links to folders are followed, but not into a folder that they lie in. Pipes and devices are no files.
    """
    return _files_in(folder, "", frozenset(), Watch())


class _FolderSearch:
    def __init__(self, folder: Path, *, quiet: bool) -> None:
        self.rules = f"pictures {sorted(suffixes())}"  # another Pillow may read others
        self.watch = Watch()
        self._folder = folder
        self._quiet = quiet
        self._pictures, self._others = Packing(), Packing()
        self._subfolders: list[str] = []  # that the pictures lie in

    def steps(self) -> Iterator[None]:
        files = _files_in(self._folder, "", frozenset(), self.watch)
        title = f"files in {self._folder}"
        with tqdm(files, title, unit="", delay=2, leave=False, disable=self._quiet) as bar:
            for path in bar:
                if is_picture_name(path):
                    self._pictures.add(path)
                    subfolder, below, _ = path.partition(os.sep)
                    self._subfolders.append(sys.intern(subfolder) if below else "")
                else:
                    self._others.add(path)
                yield

    def found(self) -> Arrays:
        classes, labels = number_classes(self._subfolders if "" not in self._subfolders else [])
        names = {
            "names": self._pictures.names(),
            "others": self._others.names(),
            "classes": Names.of(classes),
        }
        arrays: dict[str, np.ndarray[Any, Any]] = {"labels": np.array(labels or [], np.int32)}
        for part, packed in names.items():
            arrays[part], arrays[f"{part}_ends"] = packed.arrays()
        return arrays


def _files_in(folder: Path, prefix: str, above: frozenset[tuple[int, int]], watch: Watch) -> Iterator[str]:
    identity = watch.look(folder)
    here = (identity.st_dev, identity.st_ino) if identity else (0, 0)
    if here in above:
        return
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                folders.append(entry.name)
            elif _is_file(entry, watch):
                files.append(entry.name)
    yield from (prefix + name for name in sorted(files))
    for name in sorted(folders):
        yield from _files_in(folder / name, f"{prefix}{name}{os.sep}", above | {here}, watch)


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder or leads to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: "os.DirEntry[str] | Path", watch: Watch) -> bool:
    """Whether it is a regular file, or a link that leads nowhere: whoever reads that one learns why."""
    with suppress(OSError):  # a link to itself
        if entry.is_file():
            return True
        if not entry.is_symlink():
            return False
    return watch.look(entry) is None


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
    watch = Watch()
    for part in _expand_braces(pattern):
        if has_magic(part):
            matches = map(Path, _matches(Path(part)))
            files += sorted({str(match) for match in matches if _is_file(match, watch)})
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
    paths = Packing()
    with_class: list[str] = []
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            for path, class_name in _csv_rows(lines) if file.suffix.lower() == ".csv" else _text_rows(lines):
                paths.add(path)
                if class_name:
                    with_class.append(sys.intern(class_name))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is not a list of pictures in UTF-8 text: {error}") from error
    if not len(paths):
        raise UserError(f"{file} lists no pictures: it takes one path per line, then optionally a class")
    if 0 < len(with_class) < len(paths):
        raise UserError(
            f"{file} gives a class to {len(with_class)} of its {len(paths)} pictures; give all one or none"
        )
    return PictureFiles(file.parent, paths.names(), *number_classes(with_class, by_value=True))


def _text_rows(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    columns = (line.strip("\r\n").partition("\t") for line in lines)
    return ((path.strip(), class_name.strip()) for path, _, class_name in columns if path.strip())


def _csv_rows(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Path and class, "" when there is none: the first two columns, unless a header names others."""
    first_line = next(lines, "")
    separator = next((character for character in _SEPARATORS if character in first_line), _SEPARATORS[0])
    table = csv.reader(chain([first_line], lines), delimiter=separator)
    rows = ([cell.strip() for cell in row] for row in table if any(cell.strip() for cell in row))
    first_rows = list(islice(rows, 2))
    header = _columns_by_header(first_rows)
    columns = header or (0, 1)
    for row in chain(first_rows[1:] if header else first_rows, rows):
        path, class_name = (row[column] if column < len(row) else "" for column in columns)
        if path:
            yield path, class_name


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
