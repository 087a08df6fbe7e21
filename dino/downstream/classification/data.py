"""The labelled sets of classification, by the names that XCiT's main.py gives them."""

from bisect import bisect_right
from itertools import accumulate

from PIL.Image import Image

from dino.downstream.classification.inaturalist import open_inaturalist
from dino.evaluation.labelled_sets import open_train_and_val, open_val
from dino.evaluation.subject import say
from dino.runtime.files import expanded
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures

_TORCHVISION = {"CIFAR10": "CIFAR10", "CIFAR100": "CIFAR100", "CARS": "StanfordCars", "FLOWERS": "Flowers102"}
_INATURALIST = {"INAT": 2018, "INAT19": 2019}
_NOT_OFFERED = {"IMNET22k": "ImageNet-22k, which the original names but does not implement"}
NAMES = ("IMNET", *_TORCHVISION, *_INATURALIST)


class Joined(Pictures):
    """Several sets of the same classes, one after the other."""

    def __init__(self, parts: list[Pictures]) -> None:
        self.parts = parts
        self.classes = max((part.classes for part in parts), key=len)
        self.labels = [label for part in parts for label in part.labels or []]
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        part, place = self._find(index)
        return part.name(place)

    def picture(self, index: int, *, at_least: int | None = None) -> Image:
        part, place = self._find(index)
        part.as_stored = self.as_stored
        return part.picture(place, at_least=at_least)

    def stamp(self, index: int) -> tuple[str, int, int]:
        part, place = self._find(index)
        return part.stamp(place)

    def _find(self, index: int) -> tuple[Pictures, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def open_both(data_set: str, data_path: str, level: str) -> tuple[Pictures, Pictures]:
    """The pictures to train on and those to evaluate on; `labelled_sets.class_numbers` relates their labels.

    Args:
        data_set: one of `NAMES`, or of a torchvision set.
        data_path: its folder; for `IMNET` all that `labelled_sets.open_train_and_val` takes.
        level: of iNaturalist's taxonomy.

    Raises:
        UserError: there is no such set, or it is not where it is said to be.
    """
    if data_set in _NOT_OFFERED:
        raise UserError(f"--data_set {data_set} is {_NOT_OFFERED[data_set]}; known: {', '.join(NAMES)}")
    if data_set == "IMNET":
        return open_train_and_val(data_path, say=say)
    if data_set in _INATURALIST:
        year = _INATURALIST[data_set]
        train, val = (
            open_inaturalist(expanded(data_path, "--data_path"), year, split, level)
            for split in ("train", "val")
        )
        return train, val
    return _open_torchvision(data_set, data_path)


def open_to_evaluate(data_set: str, data_path: str, level: str) -> tuple[Pictures, list[str]]:
    """The pictures to evaluate on alone, and the classes that number them."""
    if data_set == "IMNET":
        return open_val(data_path)
    train, val = open_both(data_set, data_path, level)
    return val, train.classes


def _open_torchvision(data_set: str, data_path: str) -> tuple[Pictures, Pictures]:
    from dino.runtime.torchvision_sets import open_torchvision_set  # takes seconds to import

    source = f"{_TORCHVISION.get(data_set, data_set)}:{data_path}"
    if data_set == "FLOWERS":  # the benchmark trains on both of the small parts
        train: Pictures = Joined(
            [open_torchvision_set(source, "train", part=part) for part in ("train", "val")]
        )
        return train, open_torchvision_set(source, "val", part="test")
    train, val = open_torchvision_set(source, "train"), open_torchvision_set(source, "val")
    if train.labels is None or val.labels is None:
        raise UserError(f"--data_set {data_set} has no class for every picture")
    return train, val
