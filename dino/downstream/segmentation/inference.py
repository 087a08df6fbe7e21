"""From a picture to the class of each of its pixels: at once, or in sliding windows.

K classes; logits are kept at the head's stride, and enlarged in bands of rows only to find the largest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dino.downstream.segmentation.classes import PlaceArray
from dino.downstream.segmentation.views import TestView
from dino.runtime.distributed import autocast
from xcit.pyramid import STRIDES
from xcit.segmenter import Segmenter

FINEST, COARSEST = STRIDES[0], STRIDES[-1]

_VALUES_AT_ONCE = 2**24  # of a band of enlarged logits


@dataclass(frozen=True, eq=False)
class Predictor:
    """Called with a picture, a network's answer for each pixel.

    Attributes:
        network: on `device`, in evaluation mode.
        view: how a picture is resized and normalised.
        window: side in pixels of the windows, a multiple of the coarsest stride; 0 = the whole picture at once.
        stride: pixels from one window to the next, a multiple of the finest stride.
        precision: of the forward pass.
    """

    network: Segmenter
    view: TestView
    window: int = 0
    stride: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - cannot be changed
    precision: str = "fp32"

    def __call__(self, image: NDArray[np.uint8]) -> PlaceArray:
        """Places (rows, cols) of the classes, for a picture (rows, cols, 3) uint8 RGB.

        Beside the network's own needs, this takes K floats for every 16 pixels that it sees.
        """
        with torch.inference_mode():
            pixels = self.view(image)
            logits = self._windowed(pixels) if self.window else self._coarse(pixels)
            return largest(logits, shown=(pixels.shape[1], pixels.shape[2]), size=image.shape[:2])

    def _coarse(self, pixels: Tensor) -> Tensor:
        """Logits (K, rows, cols) float32 at the finest stride of the padded pixels (3, H, W)."""
        with autocast(self.device, self.precision):
            return self.network.coarse(pixels[None].to(self.device))[0].float()

    def _windowed(self, pixels: Tensor) -> Tensor:
        """The mean of all windows that see a place."""
        bottom, right = (-side % COARSEST for side in pixels.shape[1:])
        pixels = F.pad(pixels, (0, right, 0, bottom))
        grid = [side // FINEST for side in pixels.shape[1:]]
        total = torch.zeros(self.network.num_classes, *grid, device=self.device)
        counts = torch.zeros(*grid, device=self.device)
        for top in starts(pixels.shape[1], self.window, self.stride):
            for left in starts(pixels.shape[2], self.window, self.stride):
                logits = self._coarse(pixels[:, top : top + self.window, left : left + self.window])
                rows, cols = (
                    slice(first // FINEST, first // FINEST + length)
                    for first, length in zip((top, left), logits.shape[1:], strict=True)
                )
                total[:, rows, cols] += logits
                counts[rows, cols] += 1
        return total.div_(counts)


def starts(side: int, window: int, stride: int) -> Iterator[int]:
    """Where windows begin along a side; the last one ends with it."""
    last = max(side - window, 0)
    yield from range(0, last, stride)
    yield last


def largest(logits: Tensor, *, shown: tuple[int, int], size: tuple[int, ...]) -> PlaceArray:
    """The class of the largest logit for every pixel: (rows, cols) int16.

    Logits are interpolated between the centres of what they stand for, as `torch.nn.functional.interpolate` does with
    `align_corners=False`.

    Args:
        logits: (K, h, w) at the finest stride.
        shown: (rows, cols) of the picture that the network saw, which the logits may exceed.
        size: (rows, cols) of the answer.
    """
    classes, height, width = logits.shape
    # A picture of another size than shown is seen as if it were resized.
    cols_low, cols_high, cols_share = _between(size[1], shown[1] / size[1] / FINEST, width, logits)
    rows_low, rows_high, rows_share = _between(size[0], shown[0] / size[0] / FINEST, height, logits)
    band = max(_VALUES_AT_ONCE // (classes * size[1]), 1)
    answer = np.empty(size[:2], np.int16)
    for first in range(0, size[0], band):
        rows = slice(first, first + band)
        values = torch.lerp(logits[:, rows_low[rows]], logits[:, rows_high[rows]], rows_share[rows, None])
        values = torch.lerp(values[..., cols_low], values[..., cols_high], cols_share)
        answer[rows] = values.argmax(dim=0).to(torch.int16).cpu().numpy()
    return answer


def _between(count: int, step: float, length: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For `count` places, the neighbours among `length` values and the second one's share, where `like` is."""
    centres = (torch.arange(count, dtype=torch.float64) + 0.5) * step - 0.5
    centres = centres.clamp(0, length - 1)
    low = centres.floor().long()
    high, share = (low + 1).clamp(max=length - 1), (centres - low).to(like.dtype)
    return low.to(like.device), high.to(like.device), share.to(like.device)
