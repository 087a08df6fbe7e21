"""From weights to the scale that colours stand for: of each picture, of a whole clip, running along it, or fixed.

    scaled = PictureScale()(layers)              # {"mean": (R, C) in [0, 1], ...}

Layers are maps (R, C) of raw weights by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dino.attention.render import FloatArray, normalize, percentile_limits

Layers = Mapping[str, FloatArray]
Percentiles = tuple[float, float]

# What a clip's limits are taken from: frames evenly spread over it, fewer where they have many patches. More would
# change them by nothing to be seen.
_SAMPLED_FRAMES = 256
_SAMPLED_WEIGHTS = 2**22
_LEAST_FRAMES = 32

# In which a running scale forgets: slower than a flicker, faster than a scene.
_SECONDS_TO_FORGET = 2.0


class Scale(Protocol):
    """Each layer's values on [0, 1]."""

    def __call__(self, layers: Layers, seconds: float = 0.0) -> dict[str, FloatArray]:
        """Args: layers of one picture; `seconds` since the clip's start."""


@dataclass(frozen=True)
class PictureScale:
    """Each map by its own percentiles, low and high in [0, 100]."""

    percentiles: Percentiles = (0.0, 100.0)

    def __call__(self, layers: Layers, seconds: float = 0.0) -> dict[str, FloatArray]:
        return {name: normalize(layer, percentiles=self.percentiles) for name, layer in layers.items()}


@dataclass(frozen=True)
class FixedScale:
    """The same limits for every map, low and high, in multiples of the weight that each patch has when all are
    equal: they hold for pictures of any size."""

    limits: tuple[float, float]

    def __call__(self, layers: Layers, seconds: float = 0.0) -> dict[str, FloatArray]:
        low, high = self.limits
        return {
            name: normalize(layer, limits=(low / layer.size, high / layer.size))
            for name, layer in layers.items()
        }


class ClipScale:
    """One scale for a whole clip: `see` every frame first."""

    def __init__(self, percentiles: Percentiles) -> None:
        self._percentiles = percentiles
        self._seen: dict[str, list[FloatArray]] = {}
        self._count = 0
        self._stride = 1
        self._limits: dict[str, FloatArray] = {}

    def see(self, layers: Layers) -> None:
        """Take note of one frame's layers; memory is bounded whatever the number of frames."""
        if self._count % self._stride == 0:
            for name, layer in layers.items():
                self._seen.setdefault(name, []).append(np.array(layer, np.float32))
            if any(len(kept) > 2 * _frames_sampled(kept[0]) for kept in self._seen.values()):
                self._seen = {name: kept[::2] for name, kept in self._seen.items()}
                self._stride *= 2
        self._count += 1
        self._limits.clear()

    def __call__(self, layers: Layers, seconds: float = 0.0) -> dict[str, FloatArray]:
        if not self._limits:
            self._limits = {name: self._pooled(kept) for name, kept in self._seen.items()}
        return {name: normalize(layer, limits=self._limits[name]) for name, layer in layers.items()}

    def _pooled(self, frames: list[FloatArray]) -> FloatArray:
        pooled = np.concatenate([frame.ravel() for frame in frames])
        return percentile_limits(pooled[None], self._percentiles)


def _frames_sampled(layer: FloatArray) -> int:
    return max(_LEAST_FRAMES, min(_SAMPLED_FRAMES, _SAMPLED_WEIGHTS // layer.size))


class RunningScale:
    """Limits that follow those of the frames slowly, for what has no end or is to be seen at once."""

    def __init__(self, percentiles: Percentiles) -> None:
        self._percentiles = percentiles
        self._limits: dict[str, FloatArray] = {}
        self._seconds = 0.0

    def __call__(self, layers: Layers, seconds: float = 0.0) -> dict[str, FloatArray]:
        step = 1 - math.exp(-max(0.0, seconds - self._seconds) / _SECONDS_TO_FORGET)
        self._seconds = seconds
        for name, layer in layers.items():
            now = percentile_limits(layer, self._percentiles)
            before = self._limits.get(name, now)
            self._limits[name] = np.asarray(before + step * (now - before), np.float32)
        return {name: normalize(layer, limits=self._limits[name]) for name, layer in layers.items()}
