"""What a detector finds in a user's pictures: drawn over each, and all of it in one file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.attention.render import save_png
from dino.downstream.detection.coco import coco_tools
from dino.downstream.detection.drawing import ObjectsOverlay
from dino.downstream.detection.evaluation import Found
from dino.downstream.detection.network import Classes
from dino.downstream.inputs import pictures_to_see
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.images import BrokenImageError, decode
from dino.runtime.options import UserError
from dino.runtime.progress import progress

OVERLAY, RESULTS = "_objects.png", "detections.json"  # what the outputs' names end with

_NAMED = 5  # classes in a picture's line


def draw_pictures(
    places: Sequence[str],
    output_dir: Path,
    find: Callable[[NDArray[np.uint8]], Found],
    classes: Classes,
    *,
    threshold: float,
    opacity: float = 0.45,
) -> None:
    """Write an overlay for each picture into the folder, below it for pictures that are found in subfolders, and the
    objects of all into one file: COCO results, with the names of pictures and categories beside their ids.

    Args:
        places: files, folders and patterns; what this has written before is no input.
        find: the objects of a picture (H, W, 3) uint8 RGB.
        threshold: certainty from which an object is drawn, in [0, 1]; the file has all that are found.

    Raises:
        UserError: something does not exist, is no picture, or none can be read.
    """
    coco_tools()
    inputs = pictures_to_see(places, output_dir, (OVERLAY,))
    overlay = ObjectsOverlay(opacity)
    results: list[dict[str, Any]] = []
    broken: list[str] = []
    names = dict(zip(classes.ids, classes.names, strict=True))
    for number, (each, stem) in enumerate(progress(inputs, "pictures", "picture"), start=1):
        try:
            picture = np.asarray(decode(Path(each.place), each.name))
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        found = find(picture)
        of_picture = {"image_id": number, "file_name": each.name}
        results += [
            {**of_picture, **result, "category_name": names[result["category_id"]]}
            for result in found.results(classes.ids)
        ]
        shown = found.above(threshold)
        called = [classes.names[label] for label in shown.labels]
        make_writable(stem.parent, "--output_dir")
        drawn = overlay(
            picture, shown.boxes, shown.labels.tolist(), called, shown.scores.tolist(), shown.masks()
        )
        save_png(drawn, stem.with_name(stem.name + OVERLAY))
        print(f"{each.title}: {_counted(called)}", flush=True)
    for line in broken:
        print(f"left out: {line}")
    if len(broken) == len(inputs):
        raise UserError(f"none of the {len(inputs)} pictures can be read")
    _write(results, output_dir / RESULTS)
    print(
        f"{len(inputs) - len(broken)} pictures written to {output_dir}: *{OVERLAY}, and {len(results)} objects in "
        f"{RESULTS}"
    )


def _write(results: Sequence[dict[str, Any]], path: Path) -> None:
    text = json.dumps(results, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="replace"))


def _counted(names: Sequence[str]) -> str:
    counts = {name: names.count(name) for name in names}
    listed = [f"{count} {name}" for name, count in counts.items()]
    more = [f"{len(listed) - _NAMED} kinds more"] if len(listed) > _NAMED else []
    return ", ".join([*listed[:_NAMED], *more]) or "no objects"
