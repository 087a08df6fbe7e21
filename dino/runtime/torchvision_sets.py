"""The data sets that torchvision knows by name: found in its cache, else downloaded into it."""

import difflib
import inspect
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torchvision
from filelock import FileLock

from dino.runtime.images import BrokenImageError, reading, rgb
from dino.runtime.options import UserError
from dino.runtime.pictures import VAL_NAMES, Pictures, Split

# What the sets call the part to train on and the part to score on, best first.
_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "trainval", "train-standard"),
    "val": VAL_NAMES,
}

# Where the sets keep the label of every picture; the last two hold (path, label).
_LABELS = ("targets", "labels", "_labels", "y")
_SAMPLES = ("samples", "_samples")


class TorchvisionPictures(Pictures):
    """The pictures of a torchvision data set whose items begin with a picture."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset = dataset
        self._name = name
        self.labels = _labels(dataset)
        self.classes = [] if self.labels is None else _classes(dataset, max(self.labels) + 1)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return f"{self._name}/{index:06d}"

    def picture(self, index: int, *, at_least: int | None = None) -> PIL.Image.Image:
        with reading(self.name(index)):
            picture = self._dataset[index][0]
            return picture.convert("RGB") if self.as_stored else rgb(picture)


def open_torchvision_set(data_path: str, split: Split, *, part: str = "") -> TorchvisionPictures:
    """The set `Name`, kept in torch's cache folder, or `Name:folder`.

    Args:
        part: the set's own name of the part to take; empty = the first of those that `split` is called.

    Raises:
        UserError: there is no such set, it has no such split, or it is neither there nor reachable.
    """
    name, _, root = data_path.partition(":")
    known = _known_sets()
    if name not in known:
        others = {other.lower(): other for other in torchvision.datasets.__all__ if other not in known}
        if name.lower() in others:
            raise UserError(
                f"torchvision cannot download {others[name.lower()]}: give the folder that holds it"
            )
        lower = {known_name.lower(): known_name for known_name in known}
        nearest = [lower[match] for match in difflib.get_close_matches(name.lower(), lower)]
        raise UserError(
            f"{data_path} is no file or folder, nor demo, nor a data set of torchvision"
            + (f"; did you mean {' or '.join(nearest)}?" if nearest else "")
        )
    folder = Path(root).expanduser() if root else Path(torch.hub.get_dir()).parent / "datasets"
    dataset = _build(name, known[name], folder, split, part)
    pictures = TorchvisionPictures(dataset, f"{name}/{part or split}")
    try:
        pictures.picture(0)
    except BrokenImageError as error:
        raise UserError(f"{name} is not a set of pictures, or is damaged in {folder}: {error}") from error
    return pictures


def _known_sets() -> dict[str, type[Any]]:
    """The sets that a folder to keep them in is enough for, and those that need none."""
    known = {}
    for name in torchvision.datasets.__all__:
        kind = getattr(torchvision.datasets, name)
        if not inspect.isclass(kind):
            continue
        parameters = inspect.signature(kind).parameters
        needed = {p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        if needed <= {"root"} and ("download" in parameters or "root" not in parameters):
            known[name] = kind
    return known


def _build(name: str, kind: type[Any], folder: Path, split: Split, part: str) -> Any:
    parameters = inspect.signature(kind).parameters
    fixed: dict[str, Any] = {}
    if "root" in parameters:
        folder.mkdir(parents=True, exist_ok=True)
        fixed["root"] = folder
    if "train" in parameters:
        fixed["train"] = split == "train"
    option = next((option for option in ("split", "image_set") if option in parameters), None)
    names = (part,) if part else _SPLITS[split]
    choices = [{option: name} for name in names] if option else [{}]
    # One process downloads, the others wait. A folder where nothing can be written needs no lock.
    writable = "root" in parameters and os.access(folder, os.W_OK)
    refusals = []
    with FileLock(folder / f".{name}.lock") if writable else nullcontext():
        for choice in choices:
            try:
                return _construct(name, kind, {**fixed, **choice})
            except UserError:
                raise
            except ValueError as error:  # how torchvision refuses the name of a split
                refusals.append(str(error))
    raise UserError(f"{name} has nothing for the split '{split}': {_one_line(refusals[0])}")


def _construct(name: str, kind: type[Any], arguments: dict[str, Any]) -> Any:
    if "download" not in inspect.signature(kind).parameters:
        return kind(**arguments)
    try:
        return kind(**arguments, download=False)
    except (RuntimeError, OSError):  # how torchvision says that it is not there
        pass
    try:
        return kind(**arguments, download=True)
    except (
        RuntimeError,
        OSError,
        ImportError,
        ValueError,
    ) as error:  # the last where the set's server is gone
        raise UserError(
            f"{name} is not in {arguments['root']} and cannot be downloaded: {_one_line(str(error))}"
        ) from error


def _labels(dataset: Any) -> list[int] | None:
    for attribute in _LABELS:
        if hasattr(dataset, attribute):
            return _class_numbers(getattr(dataset, attribute), len(dataset))
    for attribute in _SAMPLES:
        if hasattr(dataset, attribute):
            return _class_numbers([sample[-1] for sample in getattr(dataset, attribute)], len(dataset))
    return None


def _class_numbers(values: Any, count: int) -> list[int] | None:
    """One class number for each picture, or None: other targets than that, and -1 for pictures without."""
    try:
        numbers = np.asarray(values)
    except ValueError:  # lists of different lengths
        return None
    if numbers.shape != (count,) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        return None
    return [int(number) for number in numbers]


def _classes(dataset: Any, count: int) -> list[str]:
    """Names of the classes; numbers where the set has no names. Of several names for one, the first."""
    names = [name if isinstance(name, str) else name[0] for name in getattr(dataset, "classes", ())]
    return names if len(names) >= count else [str(number) for number in range(count)]


def _one_line(text: str) -> str:
    return " ".join(text.split())
