"""What is done once in a while during a run: k-NN accuracy, a sheet of attention maps, the curves.

Looking changes nothing in the run: networks are left in their mode, and random numbers are drawn by the step.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import nn

from dino.attention.maps import attention_maps, patch_side, resize
from dino.attention.render import save_png
from dino.attention.sheet import AttentionSheet
from dino.curves import draw_curves
from dino.evaluation.features import Features, extract_features
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.labelled_sets import class_numbers
from dino.runtime.backbones import has_class_attention
from dino.runtime.images import BrokenImageError
from dino.runtime.pictures import Pictures, open_pictures

NEIGHBOURS = 20
_PICTURES_ON_SHEET = 5


def open_parts(data_path: str) -> tuple[Pictures, Pictures | None]:
    """Pictures that vote and pictures to classify; None when the data has no validation part of its own."""
    train = open_pictures(data_path, split="train")
    if train.labels is None:
        return train, None
    test = open_pictures(data_path, split="val")
    same = len(test) == len(train) and test.name(0) == train.name(0)
    return train, None if same else test


class Spread(Pictures):
    """At most `count` of a set's pictures, evenly spaced over it, so that sorted classes all have their part."""

    def __init__(self, whole: Pictures, count: int) -> None:
        self.whole = whole
        self.indices = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int).tolist()
        self.classes = whole.classes
        self.labels = None if whole.labels is None else [whole.labels[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])

    def picture(self, index: int, *, at_least: int | None = None) -> Image:
        return self.whole.picture(self.indices[index], at_least=at_least)


class Monitor:
    """Looks at a backbone with always the same pictures.

    Args:
        folder: the run's.
        train: pictures that vote, and, without `test`, are judged by all the others.
        test: pictures to classify; None = leave one out.
        max_pictures: of each of the two.
        size: side in pixels of what the backbone is shown.
        say: prints a line.
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
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.train = Spread(train, max_pictures)
        self.test = Spread(test, max_pictures) if test is not None else None
        self.size = size
        self.device = device
        self.precision = precision
        self.num_workers = num_workers
        self.say = say
        self._shown = _first_readable(Spread(test or train, 4 * _PICTURES_ON_SHEET), _PICTURES_ON_SHEET)

    def look(self, backbone: nn.Module, *, epoch: int) -> dict[str, float]:
        """k-NN accuracies in percent, where there are labels; writes `attention/epoch_NNNN.png`."""
        accuracies = self._knn(backbone)
        title = f"epoch {epoch}"
        if accuracies:
            title += f"  ·  {NEIGHBOURS}-NN {accuracies['knn']:.1f} %"
            self.say(
                f"epoch {epoch}: {NEIGHBOURS}-NN accuracy {accuracies['knn']:.1f} %, "
                f"balanced {accuracies['knn_balanced']:.1f} %"
            )
        if has_class_attention(backbone):
            self._draw_attention(backbone, title, self.folder / "attention" / f"epoch_{epoch:04}.png")
        return accuracies

    def draw_curves(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write `curves.png`."""
        draw_curves(list(rows), self.folder / "curves.png")

    def _knn(self, backbone: nn.Module) -> dict[str, float]:
        if self.train.labels is None or (self.test is not None and self.test.labels is None):
            return {}
        train = self._features(backbone, self.train)
        test = train if self.test is None else self._features(backbone, self.test)
        own_labels = np.arange(len(self.train.classes))
        numbers = own_labels if self.test is None else class_numbers(self.test.classes, self.train.classes)
        result = knn_accuracy(
            train.class_token,
            _labels(train),
            test.class_token,
            numbers[_labels(test)],
            ks=(NEIGHBOURS,),
            exclude_self=self.test is None,
        )[NEIGHBOURS]
        return {"knn": result.top1, "knn_balanced": result.balanced}

    def _features(self, backbone: nn.Module, pictures: Pictures) -> Features:
        return extract_features(
            backbone,
            pictures,
            size=self.size,
            device=self.device,
            precision=self.precision,
            num_workers=self.num_workers,
            progress=None,
        )

    def _draw_attention(self, backbone: nn.Module, title: str, path: Path) -> None:
        images = [resize(picture, _sheet_size(picture, self.size)) for picture in self._shown]
        maps = [attention_maps(backbone, image, device=self.device) for image in images]
        path.parent.mkdir(exist_ok=True)
        sheet = AttentionSheet()
        save_png(sheet(images, maps, patch_size=patch_side(backbone), title=title), path)


def _labels(features: Features) -> NDArray[np.int64]:
    assert features.labels is not None
    return features.labels


def _sheet_size(picture: Image, size: int) -> int:
    """Attention is drawn at twice the resolution of the features, as far as the picture has it."""
    return min(2 * size, max(size, *picture.size))


def _first_readable(pictures: Pictures, count: int) -> list[Image]:
    found: list[Image] = []
    for index in range(len(pictures)):
        try:
            found.append(pictures.picture(index))
        except BrokenImageError:
            continue
        if len(found) == count:
            break
    return found
