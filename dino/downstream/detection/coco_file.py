"""A COCO file of instances as it is read: checked, and without what in it cannot be used.

Imports no pycocotools: masks are not drawn here.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino.runtime.options import UserError

_CORNERS = 3  # fewer points enclose nothing


@dataclass(frozen=True)
class CocoFile:
    """What a file says and can be used.

    Attributes:
        pictures: its entries, by ascending id.
        annotations: by id of the picture; with `box`, x0, y0, x1, y1 within the picture, beside `bbox`.
        categories: names, by ascending id.
        left_out: how many annotations were, by the reason in the plural.
    """

    path: Path
    pictures: dict[int, dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: dict[int, str]
    left_out: Counter[str]


def read_coco(path: Path, *, crowds: bool = True) -> CocoFile:
    """Args:
        crowds: keep regions in which objects are not told apart.

    Raises:
        UserError: there is no such file, it is no such file, or it contradicts itself.
    """
    content = _content(path)
    pictures = _by_id(content["images"], "image", path)
    categories = _by_id(content["categories"], "category", path)
    _by_id(content["annotations"], "annotation", path)
    left_out = Counter[str]()
    kept: dict[int, list[dict[str, Any]]] = {number: [] for number in pictures}
    for annotation in content["annotations"]:
        fault = _fault(annotation, pictures, categories)
        if fault is None and annotation.get("iscrowd") and not crowds:
            fault = "crowd regions, which are not trained on"
        if fault:
            left_out[fault] += 1
        else:
            kept[annotation["image_id"]].append(_cleaned(annotation, pictures[annotation["image_id"]]))
    names = {number: str(entry.get("name", number)) for number, entry in categories.items()}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise UserError(f"{path}: two categories are called '{twice[0]}'; give each its own name")
    return CocoFile(path, pictures, kept, names, left_out)


def size_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of a picture, by its entry."""
    return int(entry["height"]), int(entry["width"])


def _content(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    for part in ("images", "annotations", "categories"):
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise UserError(
                f"{file} is not a COCO file of instances, which has lists of images, annotations and categories: "
                f"it has no such list of {part}"
            )
    for entry in content["images"]:
        if not isinstance(entry.get("file_name"), str) or not _is_size(entry):
            raise UserError(
                f"{file}: image {entry.get('id')} needs a file_name, and a height and width in pixels"
            )
    return content


def _is_size(entry: Mapping[str, Any]) -> bool:
    return all(isinstance(entry.get(side), int) and entry[side] > 0 for side in ("height", "width"))


def _by_id(entries: Iterable[dict[str, Any]], what: str, file: Path) -> dict[int, dict[str, Any]]:
    """By ascending id."""
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        number = entry.get("id")
        if not isinstance(number, int):
            raise UserError(
                f"{file}: one of its {what} entries has the id {number!r}, and ids are whole numbers"
            )
        if number in found:
            raise UserError(f"{file}: two of its {what} entries have the id {number}; give each its own")
        found[number] = entry
    return dict(sorted(found.items()))


def _fault(
    annotation: Mapping[str, Any], pictures: Mapping[int, Any], categories: Mapping[int, Any]
) -> str | None:
    """What keeps an annotation from being used, in the plural."""
    if annotation.get("image_id") not in pictures:
        return "annotations of pictures that the file does not list"
    if annotation.get("category_id") not in categories:
        return "annotations of categories that the file does not list"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return "annotations whose box is not four numbers"
    x0, y0, x1, y1 = _clipped(box, pictures[annotation["image_id"]])
    if x1 <= x0 or y1 <= y0:
        return "objects whose box is empty or outside the picture"
    return (
        None
        if _outlines(annotation)
        else "objects without a mask, or with an outline of fewer than three points"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _clipped(box: Sequence[float], entry: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """x, y, width, height to x0, y0, x1, y1 within the picture."""
    height, width = size_of(entry)
    x, y, across, down = box
    return max(x, 0.0), max(y, 0.0), min(x + across, float(width)), min(y + down, float(height))


def _outlines(annotation: Mapping[str, Any]) -> Any:
    """The mask without the parts that enclose nothing; None where none is left."""
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        return shape if shape.get("counts") and shape.get("size") else None
    if not isinstance(shape, list):
        return None
    return [part for part in shape if _is_outline(part)] or None


def _is_outline(part: Any) -> bool:
    if not isinstance(part, list) or len(part) < 2 * _CORNERS or len(part) % 2:
        return False
    return all(_is_number(value) for value in part)


def _cleaned(annotation: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """`bbox` as it was, which evaluations go by, and `box`, which can be trained on."""
    return {
        **annotation,
        "iscrowd": int(bool(annotation.get("iscrowd"))),
        "segmentation": _outlines(annotation),
        "box": _clipped(annotation["bbox"], entry),
    }
