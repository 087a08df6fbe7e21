"""A COCO file of a few small pictures, as valid as can be; tests spoil it in one place."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino.downstream.detection.coco import CocoSet, open_coco

HEIGHT, WIDTH = 30, 40


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def annotation(
    number: int, image: int, category: int, x0: float, y0: float, x1: float, y1: float
) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": 0,
        "segmentation": rectangle(x0, y0, x1, y1),
    }


def content() -> dict[str, Any]:
    """Three pictures, the last of them without objects, and two categories whose ids have a hole between them."""
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH}
            for number in (11, 12, 13)
        ],
        "annotations": [
            annotation(1, 11, 3, 5, 5, 20, 15),
            annotation(2, 11, 7, 22, 8, 38, 28),
            annotation(3, 12, 7, 2, 3, 12, 23),
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write(folder: Path, changed: Mapping[str, Any] | None = None) -> tuple[Path, Path]:
    """The folder of the pictures, and the file; `changed` is its content where it is not `content()`."""
    described = content() if changed is None else changed
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in (11, 12, 13):
        Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(
            pictures / f"{number}.png"
        )
    file = folder / "annotations.json"
    file.write_text(json.dumps(described))
    return pictures, file


def opened(folder: Path, changed: Mapping[str, Any] | None = None, **options: Any) -> CocoSet:
    """See `write` and `open_coco`."""
    return open_coco(*write(folder, changed), **options)


def spoiled(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """`content()` with a change."""
    described = content()
    change(described)
    return described
