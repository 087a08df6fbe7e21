"""The two labelled sets of a benchmark: train, which votes or is fitted, and val, which is scored."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dino.runtime.images import is_picture_name
from dino.runtime.options import UserError
from dino.runtime.picture_files import files_in
from dino.runtime.pictures import VAL_NAMES, Pictures, open_pictures

_NAMED = 5  # classes listed in a message


def open_train_and_val(data_path: str, *, say: Callable[[str], None] = print) -> tuple[Pictures, Pictures]:
    """The two splits of what `--data_path` names; `class_numbers` relates their labels.

    Args:
        say: prints a line on classes that have no pictures.

    Raises:
        UserError: there is one set only, a set has no classes, or val has classes that train lacks.
    """
    train, val = open_one_or_two(data_path, one_will_do=False, say=say)
    assert val is not None
    return train, val


def open_one_or_two(
    data_path: str, *, one_will_do: bool, say: Callable[[str], None]
) -> tuple[Pictures, Pictures | None]:
    """The same, with None for val where there is one set and one will do."""
    train, val = open_pictures(data_path, split="train"), open_pictures(data_path, split="val")
    one_set = are_one_set(train, val)
    if one_set and not one_will_do:
        raise UserError(
            f"--data_path {data_path} is one set of pictures; two are needed: a folder that holds train/ and val/, "
            "the name of a torchvision set, or demo"
        )
    for half, pictures in (("train", train), ("val", val)):
        if pictures.labels is None:
            raise UserError(
                f"the {half} pictures of {data_path} have no classes, or one only; two or more are needed, "
                "each a folder of its own"
            )
    _report_empty_classes(data_path, train.classes, say)
    class_numbers(val.classes, train.classes)
    scored = set(val.classes)
    without = [name for name in train.classes if name not in scored]
    if without:
        say(
            f"val has no pictures of {len(without)} of train's {len(train.classes)} classes: {_some(without)}"
        )
    return train, None if one_set else val


def open_val(data_path: str) -> tuple[Pictures, list[str]]:
    """The val pictures, and the classes that number them: train's, where there is a train part.

    Raises:
        UserError: there are no pictures, or they have no classes.
    """
    folder = Path(data_path).expanduser()
    if folder.is_dir() and not (folder / "train").is_dir():
        alone = next((folder / name for name in VAL_NAMES if (folder / name).is_dir()), folder)
        val = open_pictures(str(alone), split="val")
        if val.labels is None:
            raise UserError(f"the pictures of {alone} have no classes, or one only; give each class a folder")
        return val, val.classes
    train, two = open_one_or_two(data_path, one_will_do=True, say=lambda _: None)
    return two or train, train.classes


def are_one_set(first: Pictures, second: Pictures) -> bool:
    """Whether two parts of some data are the same pictures: data without parts gives all of it for each."""
    return len(first) == len(second) and first.name(0) == second.name(0)


def class_numbers(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """The place in `known` of each of `names`, int64: what turns val's own labels into train's.

    Raises:
        UserError: some are not known; they are named.
    """
    place = {name: number for number, name in enumerate(known)}
    unknown = [name for name in names if name not in place]
    if unknown:
        raise UserError(
            f"val has {len(unknown)} of its {len(names)} classes without any in train: {_some(unknown)}; "
            "both need the same class folders"
        )
    return np.array([place[name] for name in names], dtype=np.int64)


def _report_empty_classes(data_path: str, classes: Sequence[str], say: Callable[[str], None]) -> None:
    """Folders beside those of the classes that hold no picture, which are likely to be a mistake."""
    folder = Path(data_path).expanduser()
    if not folder.is_dir():
        return
    halves = [folder / name for name in ("train", *VAL_NAMES) if (folder / name).is_dir()]
    for half in halves or [folder]:
        folders = {entry.name: entry for entry in half.iterdir() if entry.is_dir()}
        if folders.keys().isdisjoint(classes):  # folders of shards, for example
            continue
        empty = sorted(name for name, entry in folders.items() if _is_empty(entry))
        if empty:
            say(
                f"{len(empty)} class folders of {half.name}/ hold no pictures and do not count: {_some(empty)}"
            )


def _is_empty(folder: Path) -> bool:
    return not folder.name.startswith(".") and not any(map(is_picture_name, files_in(folder)))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
