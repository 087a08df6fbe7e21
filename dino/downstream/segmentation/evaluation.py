"""Scoring a segmentation network on pictures with masks, shared by all processes."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from dino.downstream.segmentation.classes import PlaceArray
from dino.downstream.segmentation.data import MaskedPictures
from dino.downstream.segmentation.inference import Predictor
from dino.downstream.segmentation.scores import Scores, count
from dino.runtime import distributed
from dino.runtime.ahead import Ahead
from dino.runtime.images import BrokenImageError
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted
from dino.runtime.progress import progress
from xcit.segmenter import Segmenter


@dataclass(eq=False)
class Evaluation:
    """Called with a network in evaluation mode, its measures; every process gets those of all pictures.

    Args:
        predictor: how pictures are shown; its network is replaced.
        pictures: each process takes its share.
        interruption: asked between pictures; a signal ends the work, for a run that is continued.

    Attributes:
        scores: of the last call; None before.
        broken: "name: reason" of the pictures that it left out.
    """

    predictor: Predictor
    pictures: MaskedPictures
    interruption: Interruption | None = None
    scores: Scores | None = field(default=None, init=False)
    broken: list[str] = field(default_factory=list, init=False)

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """In percent: see `Scores.measures`."""
        predict = replace(self.predictor, network=cast(Segmenter, network))
        classes = len(self.pictures.classes)
        counts = np.zeros((classes, classes), np.int64)
        broken: list[str] = []
        mine = range(distributed.rank(), len(self.pictures), distributed.world_size())
        with Ahead(self._read(mine, broken)) as read:
            for image, places in progress(read, "val", "picture", total=len(mine)):
                counts += count(places, predict(image), classes)
        signals = distributed.gather(self._interrupted())
        if signals:
            raise Interrupted(signals[0])
        self.broken = distributed.gather(broken)
        self.scores = Scores(_over_ranks(counts, self.predictor.device))
        return self.scores.measures()

    def _read(self, mine: range, broken: list[str]) -> Iterator[tuple[NDArray[np.uint8], PlaceArray]]:
        for index in mine:
            if self._interrupted():
                return
            try:
                yield self.pictures.read(index)
            except BrokenImageError as error:
                broken.append(str(error))

    def _interrupted(self) -> list[str]:
        name = self.interruption.signal_name if self.interruption else ""
        return [name] if name else []


def _over_ranks(counts: NDArray[Any], device: torch.device) -> NDArray[np.int64]:
    if distributed.world_size() == 1:
        return counts
    total = torch.from_numpy(counts).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()
