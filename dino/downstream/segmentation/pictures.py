"""What a segmentation network sees in a user's pictures: an overlay with a legend, and a file of class ids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dino.attention.inputs import printable
from dino.attention.render import save_png
from dino.downstream.inputs import pictures_to_see
from dino.downstream.segmentation.classes import Classes
from dino.downstream.segmentation.drawing import SegmentationOverlay, legend_entries, save_ids, with_legend
from dino.downstream.segmentation.inference import Predictor
from dino.runtime.files import make_writable
from dino.runtime.images import BrokenImageError, decode
from dino.runtime.options import UserError
from dino.runtime.progress import progress

OVERLAY, IDS = "_overlay.png", "_classes.png"  # what the names of outputs end with

_NAMED = 4  # classes in a picture's line


def draw_pictures(
    places: Sequence[str],
    output_dir: Path,
    predictor: Predictor,
    classes: Classes,
    *,
    opacity: float = 0.55,
    legend: bool = True,
) -> None:
    """Write the outputs of each picture into the folder, below it for pictures that are found in subfolders.

    Args:
        places: files, folders and patterns; what this has written before is no input.

    Raises:
        UserError: something does not exist, is no picture, or none can be read.
    """
    found = pictures_to_see(places, output_dir, (OVERLAY, IDS))
    overlay = SegmentationOverlay(opacity)
    broken: list[str] = []
    for each, stem in progress(found, "pictures", "picture"):
        try:
            image = np.asarray(decode(Path(each.place), each.name))
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        seen = predictor(image)
        entries = legend_entries(seen, classes)
        drawn = overlay(image, seen)
        make_writable(stem.parent, "--output_dir")
        save_png(with_legend(drawn, entries) if legend else drawn, stem.with_name(stem.name + OVERLAY))
        save_ids(seen, classes, stem.with_name(stem.name + IDS))
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, _, share in entries[:_NAMED])
        print(f"{printable(each.name)}: {shares}", flush=True)
    for line in broken:
        print(f"left out: {line}")
    if len(broken) == len(found):
        raise UserError(f"none of the {len(found)} pictures can be read")
    print(f"{len(found) - len(broken)} pictures written to {output_dir}: *{OVERLAY} and *{IDS}")
