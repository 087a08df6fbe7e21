"""COCO files: pictures with the boxes and masks of their objects, for training, and as the truth of an evaluation.

    objects = open_coco(Path("images/"), Path("annotations.json"))
    picture, targets = objects.read(0)    # (H, W, 3) uint8, and boxes, labels and masks

What the file says wrongly is left out and said in `left_out`, or refused in one sentence that names the file.
"""

import contextlib
import io
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino.downstream.detection.coco_file import CocoFile, read_coco, size_of
from dino.runtime.images import BrokenImageError, decode
from dino.runtime.options import UserError


class Objects(NamedTuple):
    """What is to be found in a picture of H x W pixels, N objects.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels.
        labels: (N,) int64, from 0.
        masks: (N, H, W) uint8, 0 or 1.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class CocoSet:
    """Annotated pictures of a folder; they are read later, one at a time.

    Attributes:
        folder: of the pictures.
        pictures: the file's entries, by id.
        annotations: of each of the pictures, crowds among them.
        classes: names, by label.
        category_ids: of the labels that the file has a category for.
        left_out: a sentence for each kind of thing that is.
    """

    folder: Path
    pictures: list[dict[str, Any]]
    annotations: list[list[dict[str, Any]]]
    classes: list[str]
    category_ids: dict[int, int]
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pictures)

    def only(self, numbers: Collection[int]) -> "CocoSet":
        """The same with the pictures of some ids alone."""
        kept = [place for place, each in enumerate(self.pictures) if each["id"] in numbers]
        return replace(
            self,
            pictures=[self.pictures[place] for place in kept],
            annotations=[self.annotations[place] for place in kept],
        )

    def used_classes(self) -> set[str]:
        """Names of those that pictures have objects of."""
        names = {number: self.classes[label] for label, number in self.category_ids.items()}
        return {names[each["category_id"]] for some in self.annotations for each in some}

    def with_classes(self, names: Sequence[str]) -> "CocoSet":
        """The same with labels that stand for these names, among which all used ones are."""
        ids = {self.classes[label]: number for label, number in self.category_ids.items()}
        labels = {label: ids[name] for label, name in enumerate(names) if name in ids}
        return replace(self, classes=list(names), category_ids=labels)

    def object_count(self) -> int:
        """Objects in all pictures, without crowds."""
        return sum(not each["iscrowd"] for some in self.annotations for each in some)

    def name(self, index: int) -> str:
        return str(self.pictures[index]["file_name"])

    def picture(self, index: int) -> NDArray[np.uint8]:
        """The upright picture, (H, W, 3) RGB.

        Raises:
            BrokenImageError: it cannot be read, or is not as large as its annotations say.
        """
        name, (height, width) = self.name(index), size_of(self.pictures[index])
        image = decode(self.folder / name, name)
        if image.size != (width, height):
            raise BrokenImageError(
                name,
                f"upright it is {image.width} x {image.height} pixels, and its annotations are of {width} x {height}",
            )
        return np.asarray(image)

    def read(self, index: int) -> tuple[NDArray[np.uint8], Objects]:
        """The picture, and its objects without crowds.

        Raises:
            BrokenImageError: as of `picture`, or its masks are damaged.
        """
        entry = self.pictures[index]
        labels = {category: label for label, category in self.category_ids.items()}
        objects = [each for each in self.annotations[index] if not each["iscrowd"]]
        masks = np.zeros((len(objects), *size_of(entry)), np.uint8)
        for mask, each in zip(masks, objects, strict=True):
            mask[...] = drawn(each, entry)
        return self.picture(index), Objects(
            np.array([each["box"] for each in objects], np.float32).reshape(-1, 4),
            np.array([labels[each["category_id"]] for each in objects], np.int64),
            masks,
        )


def open_coco(
    folder: Path,
    file: Path,
    *,
    classes: Sequence[str] = (),
    training: bool = False,
    keep_empty: bool = False,
    most: int = 0,
) -> CocoSet:
    """The pictures of a folder that a COCO file of instances describes.

    Args:
        classes: names that labels stand for already, such as a trained network's; none: those of the file,
            by its ids.
        training: leave out crowds, and pictures without objects.
        keep_empty: these stay all the same.
        most: keep the first so many pictures alone, by their ids; 0 = all.

    Raises:
        UserError: there is no such folder or file, it is no such file, it contradicts itself, or nothing is left.
    """
    coco_tools()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    read = read_coco(file, crowds=not training)
    kept = read.annotations
    lines = [f"{what}: {count}" for what, count in read.left_out.items()]
    there, more = _there(folder, read.pictures.values())
    lines += more
    if training and not keep_empty:
        with_objects = [each for each in there if kept[each["id"]]]
        lines += _line("pictures without objects, which are not trained on", len(there) - len(with_objects))
        there = with_objects
    if not there:
        raise UserError(f"{file} has no pictures {'with objects ' * training}in {folder}: {_reasons(lines)}")
    there = there[: most or None]
    used = (each["category_id"] for image in there for each in kept[image["id"]])
    names, ids = _labels(read, classes, used)
    return CocoSet(folder, there, [kept[each["id"]] for each in there], names, ids, lines)


def coco_tools() -> ModuleType:
    """pycocotools' masks.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pycocotools.mask
    except ImportError:
        raise UserError(
            "COCO files are read by pycocotools, which is not here: pip install 'dino-xcit[detection]'"
        ) from None
    return pycocotools.mask


def drawn(annotation: Mapping[str, Any], entry: Mapping[str, Any]) -> NDArray[np.uint8]:
    """An object's mask in its picture, (H, W) of 0 and 1.

    Raises:
        BrokenImageError: it is damaged.
    """
    height, width = size_of(entry)
    shape = annotation["segmentation"]
    try:
        with quiet():
            if isinstance(shape, list):
                rle = coco_tools().merge(coco_tools().frPyObjects(shape, height, width))
            elif isinstance(shape["counts"], list):
                rle = coco_tools().frPyObjects(shape, height, width)
            else:
                rle = shape
            mask = np.asarray(coco_tools().decode(rle))
        if mask.shape != (height, width):
            raise ValueError(f"{mask.shape[1]} x {mask.shape[0]} pixels")
    except Exception as error:  # on damaged masks pycocotools raises nearly anything
        raise BrokenImageError(
            str(entry["file_name"]), f"mask {annotation['id']} is damaged ({error})"
        ) from error
    return mask


def run_length(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO's results hold it: plain values."""
    with quiet():
        encoded = coco_tools().encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """pycocotools without what it prints, and without the warning to its authors on how it makes its arrays."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _there(folder: Path, entries: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    entries = list(entries)
    there = [each for each in entries if (folder / each["file_name"]).is_file()]
    kept = {each["id"] for each in there}
    absent = [each["file_name"] for each in entries if each["id"] not in kept]
    some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
    return there, _line(f"pictures that are not in {folder} ({some})", len(absent))


def _line(what: str, count: int) -> list[str]:
    return [f"{what}: {count}"] if count else []


def _reasons(lines: Sequence[str]) -> str:
    return "; ".join(lines) or "it lists none"


def _labels(read: CocoFile, classes: Sequence[str], used: Iterable[int]) -> tuple[list[str], dict[int, int]]:
    """Names by label, and categories' ids by label."""
    if not classes:
        return list(read.categories.values()), dict(enumerate(read.categories))
    unknown = sorted({read.categories[category] for category in used} - set(classes))
    if unknown:
        raise UserError(
            f"{read.path} has objects of '{unknown[0]}', which is none of the network's {len(classes)} classes "
            f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"
        )
    ids = {name: number for number, name in read.categories.items()}
    return list(classes), {label: ids[name] for label, name in enumerate(classes) if name in ids}
