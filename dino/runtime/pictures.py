"""Collections of pictures, and the one door to all of them: everything that `--data_path` takes."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from dino.runtime.images import is_picture_name, suffixes
from dino.runtime.options import UserError

Split = Literal["train", "val"]

# What folders and data sets call the part to score on, best first.
VAL_NAMES = ("val", "valid", "validation", "test")

_COMMON_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif")
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip")


class Pictures(ABC):
    """Pictures in a fixed order that depends on nothing but the data, so a run can resume anywhere in it.

    Safe in the workers of a DataLoader, forked or spawned: it holds no open file.

    Attributes:
        classes: names of the classes, by label; empty when there are none.
        labels: class of each picture; None when there are no classes.
        as_stored: see `images.decode`.
    """

    classes: list[str]
    labels: list[int] | None
    as_stored: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What a user finds the picture by: its path, or its shard and member; always printable."""

    @abstractmethod
    def picture(self, index: int, *, at_least: int | None = None) -> Image:
        """The picture, upright and RGB.

        Args:
            at_least: length in pixels of the short side that is enough; see `images.decode`.

        Raises:
            BrokenImageError: it cannot be read.
        """

    def stamp(self, index: int) -> tuple[str, int, int]:
        """Its name within the set; its bytes on disk and the time of their last change, 0 and 0 where there are none.

        The time is in nanoseconds, as the file system counts.
        """
        return self.name(index), 0, 0


class Spread(Pictures):
    """At most `count` of a set's pictures, evenly spaced over it, so that sorted classes all have their part."""

    def __init__(self, whole: Pictures, count: int) -> None:
        self.whole = whole
        self.indices = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int).tolist()
        self.classes = whole.classes
        self.labels = None if whole.labels is None else [whole.labels[index] for index in self.indices]

    @property
    def as_stored(self) -> bool:
        return self.whole.as_stored

    @as_stored.setter
    def as_stored(self, value: bool) -> None:
        self.whole.as_stored = value

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])

    def picture(self, index: int, *, at_least: int | None = None) -> Image:
        return self.whole.picture(self.indices[index], at_least=at_least)

    def stamp(self, index: int) -> tuple[str, int, int]:
        return self.whole.stamp(self.indices[index])


def open_pictures(data_path: str, *, split: Split = "train") -> Pictures:
    """The pictures that `data_path` stands for; the first of these that fits:

    - `demo`: the embedded pictures, `dino.runtime.demo_pictures` (a folder of that name is `./demo`);
    - a folder, nested or flat: with pictures in two or more of its subfolders and none outside, these are the
      classes. Of a folder that holds `train/` and `val/` (or `valid/`, `validation/`, `test/`), the one for `split`.
      Of a folder that holds no pictures but `.tar` files, there or below, these as shards;
    - a list: `.txt` with a path per line, optionally a tab and a class; `.csv` with columns path and class,
      with or without a header, separated by commas, semicolons or tabs;
    - a `.tar` file, in the layout of WebDataset: `key.jpg` and optionally `key.cls`;
    - a pattern, `photos/**/*.jpg` or `shards-{000..009}.tar`;
    - the name of a torchvision set, `CIFAR10` or `CIFAR10:/its/root`, downloaded when it is not there.

    What took long to look through is kept for the next start, until it changes: see `file_index`.
    Only folders with those two names, torchvision sets and `demo` know splits: elsewhere both are the same.

    Raises:
        UserError: there is nothing to open, in one sentence.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got '{split}'")
    if not data_path:
        raise UserError("the path of the pictures is empty: it takes a folder, a list, a pattern or a name")
    try:
        return _open(data_path, split)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or data_path}: {error.strerror or error}") from error


def number_classes(names: Sequence[str], *, by_value: bool = False) -> tuple[list[str], list[int] | None]:
    """The classes, in alphabetical order as in torchvision's ImageFolder, and the label of each of `names`.

    No classes and no labels where there are not two different names.

    Args:
        by_value: order names that are all numbers by their value.
    """
    distinct = set(names)
    if len(distinct) < 2:
        return [], None
    numbers = by_value and all(name.isdecimal() for name in distinct)
    classes = sorted(distinct, key=int) if numbers else sorted(distinct)
    number = {name: label for label, name in enumerate(classes)}
    return classes, [number[name] for name in names]


def labels_from(numbers: "np.ndarray[Any, np.dtype[np.int32]]") -> list[int] | None:
    """The labels as a list that holds one object for each class, not for each picture; None where there are none."""
    if not len(numbers):
        return None
    classes = list(range(int(numbers.max()) + 1))
    return [classes[number] for number in numbers.data]


# The kinds are imported where they are opened: each builds on `Pictures` and needs libraries of its own.


def _open(data_path: str, split: Split) -> Pictures:
    if data_path == "demo":
        from dino.runtime.demo_pictures import DemoPictures

        return DemoPictures(split)
    path = Path(data_path).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        return _open_file(path)
    from dino.runtime.picture_files import is_pattern

    if is_pattern(data_path):
        return _open_pattern(str(path))

    from dino.runtime.torchvision_sets import open_torchvision_set

    return open_torchvision_set(data_path, split)


def _open_folder(folder: Path, split: Split) -> Pictures:
    from dino.runtime.picture_files import pictures_below

    folder = _folder_of_split(folder, split)
    pictures, others = pictures_below(folder)
    if len(pictures):
        return pictures
    shards = [folder / file for file in others if _is_shard_name(file)]
    if shards:
        return _open_shards(shards)
    raise UserError(f"no pictures in {folder}: {len(others)} files seen; {_what_is_read()}")


def _folder_of_split(folder: Path, split: Split) -> Path:
    from dino.runtime.picture_files import is_folder

    folders: dict[str, Path] = {}
    pictures_beside = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                folders[entry.name.lower()] = folder / entry.name
            pictures_beside = pictures_beside or is_picture_name(entry.name)
    held_out = [folders[name] for name in VAL_NAMES if name in folders]
    train_is_a_class = not held_out and len(folders) > 1
    # Beside both of them a picture is something left there, such as a confusion matrix.
    more_pictures = not held_out and pictures_beside
    if "train" not in folders or train_is_a_class or more_pictures:
        return folder
    if split == "train":
        return folders["train"]
    if not held_out:
        raise UserError(f"{folder} holds train/ but none of {', '.join(f'{name}/' for name in VAL_NAMES)}")
    return held_out[0]


def _open_file(path: Path) -> Pictures:
    from dino.runtime.picture_files import read_list

    suffix = path.suffix.lower()
    if suffix in (".txt", ".csv"):
        return read_list(path)
    if _is_shard_name(path.name):
        return _open_shards([path])
    if suffix in _COMPRESSED:
        raise UserError(
            f"{path} is compressed, and pictures are read from any place in it: uncompress it first"
        )
    raise UserError(f"{path} is a file, but neither a list (.txt, .csv) nor a shard (.tar)")


def _open_shards(shards: Sequence[Path]) -> Pictures:
    from dino.runtime.tar_shards import TarPictures

    pictures = TarPictures(shards)
    if not len(pictures):
        raise UserError(f"no pictures in {len(shards)} shards, {shards[0]} the first; {_what_is_read()}")
    return pictures


def _open_pattern(pattern: str) -> Pictures:
    from dino.runtime.picture_files import PictureFiles, files_matching

    files = files_matching(pattern)
    shards = [Path(file) for file in files if _is_shard_name(file)]
    pictures = [file for file in files if is_picture_name(file)]
    if shards and pictures:
        raise UserError(
            f"{pattern} matches {len(pictures)} pictures and {len(shards)} .tar files; give either kind alone"
        )
    if shards:
        return _open_shards(shards)
    if not pictures:
        raise UserError(f"no pictures match {pattern}: {len(files)} files do; {_what_is_read()}")
    return PictureFiles(Path(), pictures)


def _is_shard_name(name: str) -> bool:
    return name.lower().endswith(".tar")


def _what_is_read() -> str:
    others = len(suffixes()) - len(_COMMON_SUFFIXES)
    return f"{', '.join(_COMMON_SUFFIXES)} and {others} other suffixes are read"
