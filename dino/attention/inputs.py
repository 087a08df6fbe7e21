"""What is to be drawn: pictures, videos, folders of frames and cameras that a user names, and where each one's
outputs go."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino.runtime.images import is_picture_name
from dino.runtime.options import UserError
from dino.runtime.picture_files import files_in, files_matching, is_pattern
from dino.runtime.remote import is_url, name_in_url
from dino.video.video_file import is_video_name

# Beside the outputs of every input: what they are, and of what. A later run knows them for its own by it.
RECORD = "attention.json"

Kind = Literal["picture", "video", "frames", "camera"]


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


def find_inputs(
    places: Sequence[str], output_dir: Path, *, frame_folders: Sequence[str] = (), option: str = "--input"
) -> list[Input]:
    """Everything that files, folders, patterns, URLs and camera numbers stand for, in that order.

    A single one has its outputs in `output_dir` itself, each of several in a subfolder of its name, and what was
    found in a folder keeps its tree. Not taken from a folder are outputs of earlier runs, and what lies in an
    `output_dir` inside it.

    Args:
        places: a folder is searched through for pictures and videos.
        frame_folders: files as above, but a folder is one video, its pictures the frames.
        option: what the user named them with.

    Raises:
        UserError: something does not exist, or there is nothing to draw.
    """
    if not places and not frame_folders:
        raise UserError(
            f"{option} is missing: name a picture, a video, a folder, or a pattern such as 'photos/*.jpg'"
        )
    found: list[tuple[Kind, str, Path]] = []
    for place in places:
        found += _found(place, output_dir, option)
    for place in frame_folders:
        is_folder = Path(place).expanduser().is_dir()
        found += [("frames", place, _plain_name(place))] if is_folder else _found(place, output_dir, option)
    if len(found) == 1:
        kind, place, name = found[0]
        if place in {str(Path(word).expanduser()) for word in places} | {*places, *frame_folders}:
            return [Input(kind, place, str(name), output_dir)]
    stems = Counter(name.with_suffix("") for _, _, name in found)
    inputs: list[Input] = []
    taken: set[Path] = set()
    for kind, place, name in found:
        folder = _free(name if stems[name.with_suffix("")] > 1 else name.with_suffix(""), taken)
        inputs.append(Input(kind, place, str(name), output_dir / folder))
    return inputs


def _found(place: str, output_dir: Path, option: str) -> list[tuple[Kind, str, Path]]:
    """Kind, place and relative name of what one word of the user stands for."""
    path = Path(place).expanduser()
    if path.is_file():
        return [(_kind(place), str(path), _plain_name(path.name))]
    if is_url(place):
        name = name_in_url(place)
        return [(_kind(name), place, _plain_name(name))]
    if place.isdecimal() and not path.exists():
        return [("camera", place, Path(f"camera-{place}"))]
    files = [file for file in _files(path, place, option) if _is_drawable(file.name)]
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files] or [path]))
    names = _outside(output_dir, root, [file.relative_to(root) for file in sorted(files)])
    names = _without_own(root, names)
    if not names:
        where = "in this folder or below it" if path.is_dir() else "fit this pattern"
        raise UserError(f"{option} {place}: no pictures or videos {where}")
    return [(_kind(name.name), str(root / name), name) for name in names]


def _files(path: Path, place: str, option: str) -> list[Path]:
    try:
        if path.is_dir():
            return [path / file for file in files_in(path)]
        if is_pattern(place):
            return [Path(file) for file in files_matching(str(path))]
    except OSError as error:
        raise UserError(f"{option}: cannot read {error.filename or path}: {error.strerror}") from error
    raise UserError(f"{option} {place}: no such file or folder")


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
    """The names without what an earlier run has drawn."""
    names = list(names)
    own = {
        folder / file
        for folder in {name.parent for name in names}
        for file in _recorded_files(root / folder / RECORD)
    }
    return [name for name in names if name not in own]


def _recorded_files(record: Path) -> list[str]:
    try:
        files = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours
        return []
    return [str(file) for file in files] if isinstance(files, list) else []


def _free(folder: Path, taken: set[Path]) -> Path:
    """The folder, with a number behind it where two of the inputs have one name."""
    free, number = folder, 2
    while free in taken:
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    taken.add(free)
    return free
