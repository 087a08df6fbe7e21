"""What a video file needs to become frames: libav's container, a clock, and pixels as RGB."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, VideoReformatter

from dino.runtime.options import UserError
from dino.video.clip import ByteArray

# Files of these forms say their length in a header, written apart from the frames; of others libav guesses it.
_HEADER_KNOWS_LENGTH = ("matroska", "mov", "avi", "flv")

# AVColorSpace values that swscale converts; 2 is "not said".
_CONVERTED = (0, 1, 4, 5, 6, 7, 9, 10)

# What libav's Matroska writer calls the length of a stream, as hours:minutes:seconds.
_DURATION_TAG = "DURATION"


def assumed_matrix(rows: int) -> Colorspace:
    """What players take the colours of a video of so many coded rows to be, where it does not say: Chromium's rule."""
    return Colorspace.ITU709 if rows >= 720 else Colorspace.ITU601


class Clock:
    """Places frames on the time of the clip: from 0, each later than the one before."""

    def __init__(self, tick: Fraction, interval: Fraction, origin: Fraction | None) -> None:
        self.origin = origin or Fraction(0)
        self.now = Fraction(0)  # the end of the last frame
        self.longest = interval
        self._tick, self._interval = tick, interval
        self._known = origin is not None
        self._last: Fraction | None = None

    def place(self, frame: Any) -> tuple[Fraction, Fraction] | None:
        """(time, duration) of the next frame in seconds; None where it is not later than the one before."""
        duration = frame.duration * self._tick if frame.duration else self._interval
        stamp = frame.pts if frame.pts is not None else frame.dts
        at = self.origin + self.now if stamp is None else stamp * self._tick
        if not self._known:
            self.origin, self._known = at, True
        moment = at - self.origin
        if self._last is not None:
            if moment < self._last - 1:  # two recordings in one file, the second with a clock of its own
                self.origin = at - self.now
                moment = self.now
            elif moment <= self._last:
                return None
            self.longest = max(self.longest, moment - self._last)
        self._last, self.now = moment, moment + duration
        return moment, duration


class Reading:
    """The packets of one stream, None at their end; notes how far the file reaches, and why reading ended."""

    def __init__(self, container: Any, stream: Any) -> None:
        self.problem = ""
        self._container, self._stream = container, stream
        self._reached = Fraction(0)

    def packets(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux():
                if packet.pts is not None:
                    end = (packet.pts + (packet.duration or 0)) * packet.time_base
                    self._reached = max(self._reached, end)
                if packet.stream_index == self._stream.index and packet.size:
                    yield packet
        except (av.FFmpegError, OSError) as error:
            self.problem = reason(error)
        yield None

    def missing(self, clock: Clock) -> Fraction | None:
        """The length in seconds that the header states, where the frames ended clearly before it."""
        stated = stated_length(self._container, self._stream)
        if stated is None or not self._container.format.name.startswith(_HEADER_KNOWS_LENGTH):
            return None
        promised, reached = stated, clock.origin + clock.now
        if self._stream.duration:
            promised += (self._stream.start_time or 0) * self._stream.time_base
        elif _DURATION_TAG not in self._stream.metadata:
            reached = max(reached, self._reached)  # the length of the file: sound may be longer than pictures
        # Headers are rounded, and the last frame of a clip that stands still may be long.
        tolerance = max(Fraction(3, 10), 3 * clock.longest, stated / 50)
        return stated if promised - reached > tolerance else None


class ToRgb:
    """Decoded frames as (rows, cols, 3) uint8 RGB, upright, with square pixels."""

    def __init__(self, aspect: Fraction) -> None:
        self._aspect = aspect if aspect > 0 and abs(aspect - 1) > Fraction(2, 100) else Fraction(1)
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> ByteArray:
        matrix = None
        if frame.colorspace not in _CONVERTED:
            matrix = assumed_matrix(frame.height)
        rgb = self._reformatter.reformat(
            frame,
            width=round(frame.width * max(self._aspect, Fraction(1))),
            height=round(frame.height / min(self._aspect, Fraction(1))),
            format="rgb24",
            src_colorspace=matrix,
            threads=1,
        )
        turns = round(frame.rotation / 90)
        return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), turns))


def open_container(file: Path) -> Any:
    """An opened container.

    Raises:
        UserError: there is no file that libav reads.
    """
    if not file.exists():
        raise UserError(f"there is no video {file}")
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "a pipe or a device"
        raise UserError(f"{file} is {kind}, not a video file")
    if not file.stat().st_size:
        raise UserError(f"{file} is empty: 0 bytes")
    try:
        # With its protocol, or a name such as "a:b.mp4" would be taken for one.
        container = av.open(f"file:{file}", metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{file} is not a video that can be read, or its end is missing: {reason(error)}"
        ) from error
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        container.close()
        raise UserError(f"{file} is a picture, not a video")
    return container


def video_stream(container: Any, file: Path) -> Any:
    """The container's main video; the cover of a record is none."""
    streams = [
        stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        holds = "sound but no pictures" if container.streams.audio else "no pictures"
        raise UserError(f"{file} holds {holds}")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise UserError(f"{file} is coded in a way that this build of libav cannot decode")
    return stream


def frame_rate(stream: Any) -> Fraction:
    """Frames per second; some files name the ticks of their clock instead, which are no frames."""
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    return next((Fraction(rate) for rate in rates if rate and rate <= 500), Fraction(25))


def stated_length(container: Any, stream: Any) -> Fraction | None:
    """Seconds of video by the stream, by Matroska's tag, or of the whole file; None where none states it."""
    if stream.duration:
        return Fraction(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get(_DURATION_TAG, ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])
    return Fraction(container.duration, av.time_base) if container.duration else None


def reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return reason[:1].lower() + reason[1:]
