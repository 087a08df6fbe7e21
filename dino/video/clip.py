"""A clip as whatever gives it: frames with their times, the part that is taken, and one size for all."""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from dino.runtime.options import UserError

ByteArray = NDArray[np.uint8]

Self = TypeVar("Self", bound="Clip")

# Times are stored rounded, by Matroska to milliseconds: a frame at 0.9996 s belongs to what starts at 1 s.
ROUNDING = Fraction(1, 1000)


@dataclass(frozen=True)
class Frame:
    """A picture of a clip.

    Args:
        pixels: (rows, cols, 3) uint8 RGB, upright.
        time: seconds since the first frame that is given out, which has 0.
        duration: seconds until the next frame; for the last one as the file says, else the typical interval.
    """

    pixels: ByteArray
    time: Fraction
    duration: Fraction


class FrameSource(Protocol):
    """What frames come from; to be used with `with`, and iterated.

    Args:
        name: what to call it in messages.
        size: (rows, cols) of every frame in pixels, upright.
        rate: average frames per second.
        begins: the first frame that is given out, in seconds from the first that there is.
        length: frames expected, for progress bars; None where that is not known.
        repeatable: whether a second iteration begins anew; a camera's does not.
        damage: after an iteration, what was wrong with it as one sentence, or "".
    """

    name: str
    size: tuple[int, int]
    rate: Fraction
    begins: Fraction
    length: int | None
    repeatable: bool

    @property
    def damage(self) -> str: ...

    def __enter__(self) -> "FrameSource": ...
    def __exit__(self, *exception: object) -> None: ...
    def __iter__(self) -> Iterator[Frame]: ...


@dataclass(frozen=True)
class Span:
    """The part of a clip that is taken: seconds from its first frame, and every how many-th frame."""

    start: Fraction
    end: Fraction | None
    stride: int

    @staticmethod
    def of(start: float, end: float | None, stride: int) -> "Span":
        if not (math.isfinite(start) and start >= 0):
            raise UserError(f"the start of a clip is 0 seconds or more, got {start}")
        if end is not None and not (math.isfinite(end) and end > start):
            raise UserError(f"the end of a clip, in seconds, comes after its start at {start}, got {end}")
        if stride < 1:
            raise UserError(f"the stride takes every n-th frame, n being 1 or more, got {stride}")
        # Through text: the float nearest to 0.1 is more than 1/10 and would leave out a frame at 1/10.
        return Span(Fraction(str(start)), None if end is None else Fraction(str(end)), stride)

    def __str__(self) -> str:
        return f"from {float(self.start):g} s " + (f"to {float(self.end):g} s" if self.end else "on")

    def is_late(self, moment: Fraction) -> bool:
        return self.end is not None and moment >= self.end - ROUNDING

    def is_early(self, moment: Fraction) -> bool:
        return moment < self.start - ROUNDING

    def length(self, rate: Fraction, duration: Fraction) -> int:
        """Frames expected from `duration` seconds of a clip of `rate` frames per second, all of them."""
        end = duration if self.end is None else min(self.end, duration)
        return max(1, math.ceil(round((end - self.start) * rate) / self.stride))


@dataclass(frozen=True)
class Moment:
    """A frame of the whole clip: seconds from the clip's first frame, and how to get its pixels."""

    time: Fraction
    duration: Fraction
    pixels: Callable[[], ByteArray]


def taken(moments: Iterable[Moment], span: Span, size: tuple[int, int]) -> Iterator[Frame]:
    """The frames of the span; each lasts until the next one that is taken."""
    begin = over = Fraction(0)
    held: Moment | None = None
    index = 0
    for moment in moments:
        if span.is_early(moment.time):
            continue
        if span.end is not None and span.is_late(moment.time):
            over = min(moment.time, span.end)
            break
        if index % span.stride == 0:
            if held is None:
                begin = moment.time
            else:
                yield Frame(fitted(held.pixels(), size), held.time - begin, moment.time - held.time)
            held = moment
        index += 1
        over = moment.time + moment.duration
        over = over if span.end is None else min(over, span.end)
    if held is not None:
        yield Frame(fitted(held.pixels(), size), held.time - begin, over - held.time)


def fitted(pixels: ByteArray, size: tuple[int, int]) -> ByteArray:
    """The picture scaled to fit into `size`, centred on black where its shape is another."""
    rows, cols = pixels.shape[:2]
    if (rows, cols) == size:
        return pixels
    scale = min(size[0] / rows, size[1] / cols)
    inner = max(1, round(rows * scale)), max(1, round(cols * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    page = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    page[top : top + inner[0], left : left + inner[1]] = cv2.resize(
        pixels, (inner[1], inner[0]), interpolation=method
    )
    return page


class Clip:
    """What the sources share: frames are those of `_moments` that lie in the span."""

    name: str
    size: tuple[int, int]
    rate: Fraction
    begins: Fraction = Fraction(0)
    length: int | None = None
    repeatable: bool = True
    damage: str = ""
    _span: Span

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing stays open between iterations."""

    def __iter__(self) -> Iterator[Frame]:
        self.damage = ""
        with closing(self._moments()) as moments:
            yield from taken(moments, self._span, self.size)

    def _moments(self) -> Generator[Moment, None, None]:
        raise NotImplementedError
