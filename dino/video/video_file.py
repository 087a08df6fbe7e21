"""The frames of a video file."""

import math
from collections.abc import Generator
from contextlib import closing
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av

from dino.runtime.options import UserError
from dino.video.clip import ROUNDING, Clip, Moment, Span
from dino.video.decoding import (
    Clock,
    Reading,
    ToRgb,
    frame_rate,
    open_container,
    reason,
    stated_length,
    video_stream,
)

# Below this, decoding from the beginning costs less than finding out whether seeking is exact.
_WORTH_SEEKING = 2

_SUFFIXES = tuple(
    f".{name}"
    for name in (
        *("mp4", "m4v", "mov", "qt", "mkv", "webm", "avi", "mpg", "mpeg", "m1v", "m2v", "ts", "mts", "m2ts"),
        *("vob", "wmv", "asf", "flv", "f4v", "3gp", "3g2", "ogv", "ogm", "mxf", "dv", "divx", "y4m", "h264"),
        *("hevc", "ivf", "nut"),
    )
)


def is_video_name(name: str) -> bool:
    """Whether the suffix, in upper or lower case, is one of a video; animated GIFs count as pictures."""
    return name.lower().endswith(_SUFFIXES)


class VideoFile(Clip):
    """The frames of a video file, decoded as they are asked for, in constant memory.

    Rotation is applied, and so is the shape of the pixels where it is off by more than 2 %: the shorter side
    of a pixel is stretched. Colours follow the file's matrix and range; where it names no matrix it is taken as
    players take it, BT.709 from 720 coded rows on and BT.601 below. Times come from the file, so they may vary;
    frames that are not later than the one before are left out. A frame of another size than the first is
    scaled to fit into it. HDR is not tone-mapped.

    A damaged file gives all frames up to the damage; `damage` then says where that is. Each iteration opens the
    file anew.

    Args:
        start, end: seconds from the clip's first frame; None goes on to its end.
        stride: take every n-th frame; each then lasts until the next one taken.

    Attributes:
        origin: the clip's first frame on the file's own clock, in seconds.

    Raises:
        UserError: it cannot be read, holds no frame that can be decoded, or ends before `start`.
    """

    def __init__(self, file: Path, *, start: float = 0.0, end: float | None = None, stride: int = 1) -> None:
        self._file = file
        self._span = Span.of(start, end, stride)
        self._sought = False
        self.name = file.name
        self.origin = Fraction(0)
        with open_container(file) as container:
            stream = video_stream(container, file)
            self._rate = frame_rate(stream)
            duration = stated_length(container, stream)
            frames = stream.frames or (duration and round(duration * self._rate))
        self.rate = self._rate / stride
        self.size, self.begins = self._look()
        if frames:
            self.length = self._span.length(self._rate, duration or frames / self._rate)
            if start == 0 and end is None:
                self.length = math.ceil(frames / stride)

    def _look(self) -> tuple[tuple[int, int], Fraction]:
        """Size and time of the first frame of the span; finds out the origin and whether seeking is exact."""
        with closing(self._moments()) as moments:
            first = next(moments, None)
        if first is None:
            raise UserError(f"{self._file} holds no frame that can be decoded{self._because()}")
        if self._span.start > _WORTH_SEEKING:
            self._sought = self._can_seek()
        ends = Fraction(0)
        with closing(self._moments()) as moments:
            for moment in moments:
                if self._span.is_late(moment.time):
                    raise UserError(f"{self._file} has no frame {self._span}")
                if not self._span.is_early(moment.time):
                    rows, cols = moment.pixels().shape[:2]
                    return (rows, cols), moment.time
                ends = moment.time + moment.duration
        raise UserError(
            f"{self._file} has no frame {self._span}: it is {float(ends):.2f} s long{self._because()}"
        )

    def _because(self) -> str:
        return f" ({self.damage.partition('; what came')[0]})" if self.damage else ""

    def _seek(self, container: Any, stream: Any) -> None:
        container.seek(
            math.floor((self.origin + self._span.start - ROUNDING) / stream.time_base), stream=stream
        )

    def _can_seek(self) -> bool:
        """Whether seeking to the start lands on a keyframe at or before it: what follows decodes exactly."""
        with open_container(self._file) as container:
            stream = video_stream(container, self._file)
            try:
                self._seek(container, stream)
                packet = next(container.demux(stream))
            except av.FFmpegError:
                return False
            if not packet.is_keyframe or packet.pts is None:
                return False
            return bool(packet.pts * stream.time_base - self.origin <= self._span.start - ROUNDING)

    def _moments(self) -> Generator[Moment, None, None]:
        """All frames, or those from a keyframe before the span on."""
        with open_container(self._file) as container:
            stream = video_stream(container, self._file)
            stream.thread_type = "AUTO"
            if self._sought:
                self._seek(container, stream)
            clock = Clock(stream.time_base, 1 / self._rate, self.origin if self._sought else None)
            reading = Reading(container, stream)
            to_rgb = ToRgb(stream.sample_aspect_ratio or Fraction(1))
            count = 0
            try:
                for packet in reading.packets():
                    for frame in stream.codec_context.decode(packet):
                        count += 1
                        span = clock.place(frame)
                        if count == 1 and not self._sought:
                            self.origin = clock.origin
                        if span is not None:
                            yield Moment(*span, partial(to_rgb, frame))
                problem = reading.problem
            except (av.FFmpegError, OSError) as error:
                problem = reason(error)
            self.damage = self._damage(count, clock.now, problem, reading.missing(clock))

    def _damage(self, count: int, reached: Fraction, problem: str, promised: Fraction | None) -> str:
        place = f"{float(reached):.2f} s" if self._sought else f"{count} frames ({float(reached):.2f} s)"
        if problem:
            return f"{self.name} is damaged after {place}: {problem}; what came before is drawn"
        if promised is not None:
            return (
                f"{self.name} ends after {place} though its header says {float(promised):.2f} s: it was cut "
                "short; what it holds is drawn"
            )
        return ""
