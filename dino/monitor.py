"""What is done once in a while during a run: k-NN accuracy, a sheet of attention maps, the curves.

Looking changes nothing in the run: networks are left in their mode, and random numbers are seeded by the step.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageOps
from PIL.Image import Image, Resampling
from torch import nn

from dino.attention.maps import attention_maps, patch_side
from dino.attention.render import save_png
from dino.attention.sheet import AttentionSheet
from dino.evaluation.extraction import Extractor, Features, Preparation
from dino.evaluation.kinds import CLASS_TOKEN
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.labelled_sets import are_one_set, class_numbers
from dino.runtime.backbones import has_class_attention
from dino.runtime.distributed import is_main
from dino.runtime.files import writing
from dino.runtime.images import BrokenImageError
from dino.runtime.interruption import Interruption
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, Spread, open_pictures

NEIGHBOURS = 20
_SHEET_RESOLUTION = 3  # times the side that features are taken at
_PICTURES_ON_SHEET = 5


def open_parts(data_path: str, pictures: Pictures, *, knn_data: str = "") -> tuple[Pictures, Pictures | None]:
    """Pictures that vote and pictures to classify; None when the data has no validation part of its own.

    Args:
        pictures: what is trained on, `data_path`, open already.
        knn_data: other pictures for the purpose.

    Raises:
        UserError: `knn_data` cannot be opened, has no classes, or has other classes in val than in train.
    """
    train = open_pictures(knn_data) if knn_data else pictures
    if train.labels is None:
        if knn_data:
            raise UserError(f"--knn_data {knn_data} has no classes; k-NN needs a folder for each class")
        return train, None
    try:
        test = open_pictures(knn_data or data_path, split="val")
    except UserError:
        if knn_data:
            raise
        return train, None  # data that is whole for training need not have a second part
    return train, None if are_one_set(train, test) or test.labels is None else test


class Monitor:
    """Looks at a backbone with always the same pictures.

    Args:
        folder: the run's.
        train: pictures that vote, and, without `test`, are judged by all the others.
        test: pictures to classify; None = leave one out.
        max_pictures: of each of the two.
        size: side in pixels of what the backbone is shown.
        interruption: see `extraction.Extractor`.
        say: prints a line.

    Raises:
        UserError: `test` has classes that `train` lacks.
    """

    def __init__(
        self,
        folder: Path,
        train: Pictures,
        test: Pictures | None,
        *,
        max_pictures: int,
        size: int,
        device: torch.device,
        precision: str,
        num_workers: int,
        interruption: Interruption | None = None,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.train = Spread(train, max_pictures)
        self.test = Spread(test, max_pictures) if test is not None else None
        # Test labels are numbered by the test set's own classes: their places among those that vote.
        self.numbers = class_numbers((test or train).classes, train.classes)
        self.size = size
        self.device = device
        self.precision = precision
        self.num_workers = num_workers
        self.interruption = interruption
        self.say = say
        self._said: set[str] = set()
        # Made square at once: whole pictures of any size would stay in memory for the whole run.
        candidates = Spread(test or train, 4 * _PICTURES_ON_SHEET)
        readable = itertools.islice(_readable(candidates), _PICTURES_ON_SHEET if is_main() else 0)
        self._shown = [_square(picture, size) for picture in readable]

    def look(self, backbone: nn.Module, *, epochs: int) -> dict[str, float]:
        """k-NN accuracies in percent, where there are labels; writes `attention/epoch_NNNN.png`.

        To be called by all processes, which share the pictures; the main one has the results, the others none.
        What cannot be measured is said once and left out: a run does not stop for it.

        Args:
            epochs: how many are done, for titles and names.

        Raises:
            UserError: the sheet cannot be written.
            Interrupted: a signal came; its name.
        """
        title = f"after {epochs} {'epoch' if epochs == 1 else 'epochs'}" if epochs else "before training"
        accuracies: dict[str, float] = {}
        try:
            accuracies = self._knn(backbone)
        except UserError as error:
            self._say_once(f"no k-NN accuracy: {error}")
        if accuracies:
            accuracy = f"{NEIGHBOURS}-NN accuracy {accuracies['knn']:.1f} %"
            self.say(f"{title}: {accuracy}, balanced {accuracies['knn_balanced']:.1f} %")
            title += f"  ·  {accuracy}"
        if self._shown and has_class_attention(backbone):
            self._draw_attention(backbone, title, self.folder / "attention" / f"epoch_{epochs:04}.png")
        return accuracies

    def _knn(self, backbone: nn.Module) -> dict[str, float]:
        if self.train.labels is None:
            return {}
        train = self._features(backbone, self.train)
        test = train if self.test is None else self._features(backbone, self.test)
        if not is_main():
            return {}
        result = knn_accuracy(
            train[CLASS_TOKEN],
            _labels(train),
            test[CLASS_TOKEN],
            self.numbers[_labels(test)],
            ks=(NEIGHBOURS,),
            exclude_self=self.test is None,
        )[NEIGHBOURS]
        return {"knn": result.top1, "knn_balanced": result.balanced}

    def _features(self, backbone: nn.Module, pictures: Pictures) -> Features:
        extractor = Extractor(
            backbone,
            Preparation(size=self.size, precision=self.precision),
            device=self.device,
            num_workers=self.num_workers,
            interruption=self.interruption,
        )
        title = "k-NN features" if sys.stderr.isatty() else None
        features = extractor.extract(pictures, (CLASS_TOKEN,), progress=title)
        for broken in features.broken:
            self._say_once(f"left out of k-NN: {broken}")
        return features

    def _draw_attention(self, backbone: nn.Module, title: str, path: Path) -> None:
        try:
            maps = [attention_maps(backbone, image[None], device=self.device)[0] for image in self._shown]
        except UserError as error:
            self._say_once(f"no attention sheet: {error}")
            return
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        sheet = AttentionSheet()
        save_png(sheet(self._shown, maps, patch_size=patch_side(backbone), title=title), path)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)


def _labels(features: Features) -> NDArray[np.int64]:
    assert features.labels is not None
    return features.labels


def _square(picture: Image, size: int) -> NDArray[np.uint8]:
    """The middle of a picture, enlarged if need be: what features are taken at is too coarse a grid to look at."""
    side = _SHEET_RESOLUTION * size
    return np.asarray(ImageOps.fit(picture, (side, side), Resampling.BICUBIC))


def _readable(pictures: Pictures) -> Iterator[Image]:
    for index in range(len(pictures)):
        with suppress(BrokenImageError):
            yield pictures.picture(index)
