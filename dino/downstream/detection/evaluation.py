"""Finding objects in pictures, and scoring a detector on annotated ones, shared by all processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino.downstream.detection.coco import CocoSet, run_length
from dino.downstream.detection.coco_scores import score
from dino.downstream.detection.samples import as_image
from dino.runtime import distributed
from dino.runtime.ahead import Ahead
from dino.runtime.images import BrokenImageError
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted
from dino.runtime.progress import progress
from xcit.detector import paste_mask


@dataclass(frozen=True, eq=False)
class Found:
    """The objects in a picture, the most certain first; N of them.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels.
        labels: (N,) int64, from 0.
        scores: (N,) float32, in [0, 1].
        shape: height and width of the picture in pixels.
        probabilities: (N, 28, 28), of the mask within the box.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    shape: tuple[int, int]
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def masks(self) -> Iterator[NDArray[np.bool_]]:
        """(H, W), one at a time: those of a large picture together would take gigabytes."""
        for probabilities, box in zip(self.probabilities, torch.from_numpy(self.boxes), strict=True):
            yield paste_mask(probabilities, box, *self.shape).numpy()

    def above(self, threshold: float) -> "Found":
        """Those that are at least so certain."""
        kept = int((self.scores >= threshold).sum())
        return Found(
            self.boxes[:kept], self.labels[:kept], self.scores[:kept], self.shape, self.probabilities[:kept]
        )

    def results(self, ids: Mapping[int, int] | Sequence[int]) -> Iterator[dict[str, Any]]:
        """COCO results but for the picture's id.

        Args:
            ids: of categories, by label; objects of other labels are left out.
        """
        known = dict(enumerate(ids)) if isinstance(ids, Sequence) else ids
        for box, label, certainty, mask in zip(
            self.boxes.tolist(), self.labels.tolist(), self.scores.tolist(), self.masks(), strict=True
        ):
            if label in known:
                x0, y0, x1, y1 = box
                yield {
                    "category_id": known[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": certainty,
                    "segmentation": run_length(mask),
                }


@dataclass(frozen=True, eq=False)
class Finder:
    """Called with a detector in evaluation mode, on `device`, and a picture (H, W, 3) uint8 RGB: its objects."""

    device: torch.device
    precision: str

    def __call__(self, network: nn.Module, picture: NDArray[np.uint8]) -> Found:
        with torch.inference_mode(), distributed.autocast(self.device, self.precision):
            pixels = torch.from_numpy(
                np.array(picture.transpose(2, 0, 1), order="C")
            )  # Pillow's is read-only
            found = network([as_image(pixels.to(self.device))])[0]
        boxes, labels, scores, masks = (found[name].cpu() for name in ("boxes", "labels", "scores", "masks"))
        shape = (picture.shape[0], picture.shape[1])
        return Found(boxes.float().numpy(), labels.numpy(), scores.float().numpy(), shape, masks.float())


@dataclass(eq=False)
class Evaluation:
    """Called with a detector in evaluation mode, its measures; every process gets those of all pictures.

    Args:
        truth: annotated pictures, of which each process takes its share.
        interruption: asked between pictures; a signal ends the work, for a run that is continued.

    Attributes:
        broken: "name: reason" of the pictures that it left out.
    """

    finder: Finder
    truth: CocoSet
    interruption: Interruption | None = None
    broken: list[str] = field(default_factory=list, init=False)

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """See `coco_scores.score`."""
        results: list[dict[str, Any]] = []
        seen: list[int] = []
        broken: list[str] = []
        mine = range(distributed.rank(), len(self.truth), distributed.world_size())
        with Ahead(self._read(mine, broken)) as read:
            for index, picture in progress(read, "val", "picture", total=len(mine)):
                seen.append(index)
                found = self.finder(network, picture).results(self.truth.category_ids)
                results += [{"image_id": self.truth.pictures[index]["id"], **each} for each in found]
        signals = distributed.gather(self._interrupted())
        if signals:
            raise Interrupted(signals[0])
        self.broken = distributed.gather(broken)
        everything = distributed.gather([(seen, results)])
        if not distributed.is_main():
            (measures,) = distributed.gather(list[dict[str, float]]())
            return measures
        together = [each for _, some in everything for each in some]
        counted = sorted(index for indices, _ in everything for index in indices)
        (measures,) = distributed.gather([score(self.truth, together, pictures=counted)])
        return measures

    def _read(self, mine: range, broken: list[str]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for index in mine:
            if self._interrupted():
                return
            try:
                yield index, self.truth.picture(index)
            except BrokenImageError as error:
                broken.append(str(error))

    def _interrupted(self) -> list[str]:
        name = self.interruption.signal_name if self.interruption else ""
        return [name] if name else []
