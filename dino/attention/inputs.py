"""What is to be drawn: pictures, videos, folders of frames and cameras that a user names, and where each one's
outputs go."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino.attention.record import RECORD, is_output_name, recorded_files
from dino.runtime.files import expanded
from dino.runtime.images import is_picture_name
from dino.runtime.options import UserError
from dino.runtime.picture_files import files_in, files_matching, is_pattern
from dino.runtime.remote import is_url, name_in_url
from dino.video.video_file import is_video_name

Kind = Literal["picture", "video", "frames", "camera"]

# Control characters and bytes that are no text.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Input:
    """One thing to draw.

    Attributes:
        place: file, folder, URL, or number of a camera.
        name: what it is called on the page, relative to what was searched.
        folder: for its outputs.
    """

    kind: Kind
    place: str
    name: str
    folder: Path

    @property
    def title(self) -> str:
        """The last part of its name, to be printed and drawn."""
        return printable(Path(self.name).name)


@dataclass(frozen=True)
class _Found:
    """What a word of the user stands for.

    Attributes:
        name: relative to what was searched.
        searched: whether the word is a folder or a pattern, and not the thing itself.
    """

    kind: Kind
    place: str
    name: Path
    searched: bool = False


def find_inputs(
    places: Sequence[str], output_dir: Path, *, frame_folders: Sequence[str] = (), option: str = "--input"
) -> list[Input]:
    """Everything that files, folders, patterns, URLs and camera numbers stand for, in that order.

    A single one has its outputs in `output_dir` itself, each of several in a subfolder of its name, and what was
    found in a folder keeps its tree. No outputs go where they would overwrite an input. Not taken from a folder
    are outputs of earlier runs, and what lies in an `output_dir` inside it.

    Args:
        places: a folder is searched through for pictures and videos.
        frame_folders: files as above, but a folder is one video, its pictures the frames; what `--input_path`
            names.
        option: what the user named `places` with.

    Raises:
        UserError: something does not exist, there is nothing to draw, or a single one has the name of an output
            and lies in `output_dir`.
    """
    if not places and not frame_folders:
        raise UserError(
            f"{option} is missing: name a picture, a video, a folder, or a pattern such as 'photos/*.jpg'"
        )
    found = [each for place in places for each in _found(place, output_dir, option)]
    for place in frame_folders:
        found += _found(place, output_dir, "--input_path", as_frames=True)
    if len(found) == 1 and not found[0].searched:
        _check_not_overwritten(found[0], output_dir)
        return [Input(found[0].kind, found[0].place, str(found[0].name), output_dir)]
    folders = _folders(found, output_dir)
    return [
        Input(each.kind, each.place, str(each.name), folder)
        for each, folder in zip(found, folders, strict=True)
    ]


def printable(text: str) -> str:
    """The text with a question mark for what no terminal, file or font can show."""
    return _UNPRINTABLE.sub("?", text)


def _found(place: str, output_dir: Path, option: str, *, as_frames: bool = False) -> list[_Found]:
    """Everything that one word stands for; `as_frames`: a folder is one video."""
    if is_url(place):
        name = name_in_url(place)
        return [_Found(_kind(name), place, _plain_name(name))]
    path = expanded(place, option)
    try:
        if path.is_file():
            return [_Found(_kind(place), str(path), _plain_name(path.name))]
        if place.isdecimal() and not path.exists():
            return [_Found("camera", place, Path(f"camera-{place}"))]
        if as_frames and path.is_dir():
            return [_Found("frames", str(path), _plain_name(place))]
        files = _files(path)
    except OSError as error:
        raise UserError(f"{option}: cannot read {error.filename or path}: {error.strerror}") from error
    if files is None:
        raise UserError(f"{option} {place}: no such file or folder")
    files = [file for file in files if _is_drawable(file.name)]
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files] or [path]))
    names = _outside(output_dir, root, [file.relative_to(root) for file in sorted(files)])
    names = _without_own(root, names)
    if not names:
        where = "in this folder or below it" if path.is_dir() else "fit this pattern"
        raise UserError(f"{option} {place}: no pictures or videos {where}")
    return [_Found(_kind(name.name), str(root / name), name, searched=True) for name in names]


def _files(path: Path) -> list[Path] | None:
    """What lies in a folder or fits a pattern; None where the path is neither."""
    if path.is_dir():
        return [path / file for file in files_in(path)]
    if is_pattern(str(path)):
        return [Path(file) for file in files_matching(str(path))]
    return None


def _is_drawable(name: str) -> bool:
    return is_picture_name(name) or is_video_name(name)


def _kind(name: str) -> Kind:
    return "video" if is_video_name(name) else "picture"


def _plain_name(place: str) -> Path:
    """A relative name that cannot lead out of the output folder."""
    return Path(Path(place).expanduser().resolve().name or "input")


def _outside(output_dir: Path, root: Path, names: list[Path]) -> list[Path]:
    """The names, relative to `root`, without those in an `output_dir` inside it."""
    root, output_dir = root.resolve(), output_dir.resolve()
    if root not in output_dir.parents:
        return names
    return [name for name in names if not (root / name).is_relative_to(output_dir)]


def _without_own(root: Path, names: Iterable[Path]) -> list[Path]:
    """The names without what earlier runs have drawn, and without what lies in a folder of frames that they have."""
    names = list(names)
    folders = {folder for name in names for folder in name.parents}
    own = {folder / file for folder in folders for file in recorded_files(root / folder)}
    return [name for name in names if own.isdisjoint((name, *name.parents))]


def _check_not_overwritten(single: _Found, output_dir: Path) -> None:
    if _identity(output_dir) in _endangered(single):
        raise UserError(
            f"{single.place} would be overwritten by an output of the same name: name another folder with "
            "--output_dir"
        )


def _folders(found: Sequence[_Found], output_dir: Path) -> list[Path]:
    """For each a folder of its own, where no output overwrites an input.

    Where two have one name, a number goes behind it; upper and lower case are one name on some systems.
    """
    taken = {_identity(output_dir / name) for name in ("index.html", RECORD)}.union(*map(_endangered, found))
    stems = Counter(each.name.with_suffix("") for each in found)
    folders: list[Path] = []
    for each in found:
        stem = each.name.with_suffix("")
        first = output_dir / (each.name if stems[stem] > 1 else stem)
        free, number = first, 2
        while _identity(free) in taken or free.is_file():
            free, number = first.with_name(f"{first.name}-{number}"), number + 1
        taken.add(_identity(free))
        folders.append(free)
    return folders


def _endangered(found: _Found) -> set[str]:
    """The folders in which outputs would overwrite the input: where it lies, if it is called like one of them."""
    path = Path(found.place)
    if is_url(found.place) or found.kind == "camera":
        return set()
    return {_identity(file.parent) for file in (path, path.resolve()) if is_output_name(file.name)}


def _identity(folder: Path) -> str:
    return str(folder.resolve()).casefold()
