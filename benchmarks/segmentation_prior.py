"""What a segmentation has to beat: for every place in the picture, the class that most training masks have there.

python benchmarks/segmentation_prior.py --data_path camvid --ignore 11 255

Its mean IoU is that of an answer which has not looked at the picture. Masks of other sizes are fitted over the first.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dino.downstream.segmentation.classes import VOID, PlaceArray
from dino.downstream.segmentation.data import MaskedPictures, open_data
from dino.downstream.segmentation.scores import Scores, count, table
from dino.runtime.options import UserError, command, option
from dino.runtime.progress import progress


@dataclass(frozen=True)
class PriorOptions:
    data_path: str = option("", "Folder of pictures and masks, as dino.downstream.segment takes it.")
    ignore: tuple[int, ...] = option((255,), "Numbers in masks that are no class.")
    output: str = option("", "JSON file to write the scores to. Empty = none.")


def measure(options: PriorOptions) -> None:
    """Raises: UserError: the data does not fit, or the file cannot be written."""
    if not options.data_path:
        raise UserError("--data_path is missing: the folder of pictures and masks")
    data = open_data(options.data_path, ignore=options.ignore)
    prior = most_frequent(data.train)
    scores = score(prior, data.val)
    print(*table(scores.by_class(data.classes)), sep="\n")
    measures = scores.measures()
    print(", ".join(f"{name} {value:.2f}" for name, value in measures.items()))
    if options.output:
        Path(options.output).write_text(json.dumps(measures, indent=1) + "\n", encoding="utf-8")


def most_frequent(pictures: MaskedPictures) -> PlaceArray:
    """(rows, cols) of the first mask: the place of the class that is there in most pictures."""
    _, first = pictures.read(0)
    counts = np.zeros((len(pictures.classes), *first.shape), np.int32)
    for index in progress(range(len(pictures)), "train masks", "mask"):
        _, places = pictures.read(index)
        places = _fitted(places, first.shape)
        for place in np.unique(places[places != VOID]):
            counts[place] += places == place
    return counts.argmax(axis=0).astype(np.int16)


def score(prior: PlaceArray, pictures: MaskedPictures) -> Scores:
    """Of the same answer to every picture."""
    counts = np.zeros((len(pictures.classes),) * 2, np.int64)
    for index in progress(range(len(pictures)), "val masks", "mask"):
        _, places = pictures.read(index)
        counts += count(places, _fitted(prior, places.shape), len(pictures.classes))
    return Scores(counts)


def _fitted(places: PlaceArray, size: tuple[int, ...]) -> PlaceArray:
    if places.shape == size:
        return places
    return np.asarray(cv2.resize(places, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT), np.int16)


if __name__ == "__main__":
    command(
        PriorOptions, measure, prog="segmentation_prior.py", description="A segmentation that never looks."
    )
