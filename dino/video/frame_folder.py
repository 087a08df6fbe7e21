"""The pictures of a folder as the frames of a clip."""

import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from dino.runtime.images import BrokenImageError, decode, is_picture_name
from dino.runtime.options import UserError
from dino.video.clip import Clip, Moment, Span


class FrameFolder(Clip):
    """The pictures of a folder, not of those in it, as frames in natural order: frame-2 before frame-10.

    A picture of another size than the first is scaled to fit into it, centred on black. A broken picture is left
    out and named in `damage`; the one before lasts until the next, so the clip keeps its time.

    Args:
        fps: pictures per second.
        start, end: seconds from the first picture; None goes on to the last.
        stride: take every n-th picture; each then lasts until the next one taken.

    Raises:
        UserError: it is no folder, or holds no picture that can be read from `start` on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fps: float | Fraction = 25,
        start: float = 0.0,
        end: float | None = None,
        stride: int = 1,
    ) -> None:
        if not 0 < fps <= 1000:
            raise UserError(f"pictures per second are more than 0 and at most 1000, got {fps}")
        span = Span.of(start, end, stride)
        interval = 1 / Fraction(str(fps))
        files = _pictures(folder)
        whole = len(files) * interval
        times = [index * interval for index in range(len(files))]
        inside = [index for index, at in enumerate(times) if not (span.is_early(at) or span.is_late(at))]
        taken = inside[::stride]
        if not taken:
            raise UserError(f"{folder} has {len(files)} pictures, {float(whole):.2f} s long, but none {span}")
        ends = [*(times[index] for index in taken[1:]), whole if span.end is None else min(span.end, whole)]
        self._planned = [
            (times[index], over - times[index], files[index]) for index, over in zip(taken, ends, strict=True)
        ]
        self._span = Span(span.start, span.end, 1)
        self.name = folder.name
        self.rate = 1 / interval / stride
        self.length = len(taken)
        with closing(self._moments()) as moments:
            first = next(moments, None)
        if first is None:
            raise UserError(f"no picture in {folder} can be read: {self.damage}")
        rows, cols = first.pixels().shape[:2]
        self.size, self.begins = (rows, cols), first.time

    def _moments(self) -> Generator[Moment, None, None]:
        broken: list[str] = []
        held: Moment | None = None
        for at, duration, file in self._planned:
            try:
                pixels = np.asarray(decode(file, file.name))
            except BrokenImageError as error:
                broken.append(str(error))
                more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
                self.damage = f"{self.name} is drawn without {'; '.join(broken[:3])}{more}"
                continue
            if held is not None:
                yield held
            held = Moment(at, duration, partial(np.asarray, pixels))
        if held is not None:  # it lasts to the end, though those behind it may be broken
            last, duration, _ = self._planned[-1]
            yield replace(held, duration=last + duration - held.time)


def _pictures(folder: Path) -> list[Path]:
    try:
        files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    pictures = [file for file in files if is_picture_name(file.name)]
    if not pictures:
        raise UserError(
            f"no pictures in {folder}: {len(files)} files seen, none with the suffix of a picture"
        )
    return sorted(pictures, key=lambda file: (_natural(file.name), file.name))


def _natural(name: str) -> list[str | int]:
    """Text and numbers in turn, so that numbers compare as such."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]
