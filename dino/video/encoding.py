"""Frames as H.264 that browsers play, and as MPEG-4 in AVI."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from dino.runtime.options import UserError
from dino.video.clip import ByteArray
from dino.video.decoding import assumed_matrix
from dino.video.sound import Sound

# Ticks per second of an mp4's clock: most rates and Matroska's milliseconds are whole numbers of them.
CLOCK = 90_000

# The largest denominator of a clock in MPEG-4's stream.
_MPEG4_CLOCK = 65_535

_TO_YUV = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


class Coded:
    """A container with one video stream, in frames of even sides, and perhaps sound."""

    def __init__(self, path: Path, form: str, options: dict[str, str]) -> None:
        self.container: Any = av.open(f"file:{path}", "w", format=form, options=options)
        self.sound: Sound | None = None
        self._stream: Any = None
        self._reformatter = VideoReformatter()

    @property
    def damage(self) -> str:
        return self.sound.damage if self.sound else ""

    def _add_video(
        self, codec: str, size: tuple[int, int], rate: Fraction, tick: Fraction, **options: str
    ) -> None:
        try:
            self._stream = self.container.add_stream(codec, rate=rate, options=options)
        except av.codec.codec.UnknownCodecError as error:
            raise UserError(f"this build of PyAV has no {codec}; the one that pip installs does") from error
        rows, cols = size
        self._stream.height, self._stream.width = rows + rows % 2, cols + cols % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = self._stream.codec_context.time_base = tick
        self._stream.thread_type = "AUTO"  # slices, PyAV's choice, make an H.264 stream larger

    def _yuv(self, pixels: ByteArray, matrix: Colorspace) -> Any:
        rows, cols = pixels.shape[:2]
        if rows % 2 or cols % 2:
            pixels = np.pad(pixels, ((0, rows % 2), (0, cols % 2), (0, 0)), mode="edge")
        return self._reformatter.reformat(
            av.VideoFrame.from_numpy_buffer(pixels, "rgb24"),
            format="yuv420p",
            dst_colorspace=matrix,
            dst_color_range=ColorRange.MPEG,
            interpolation=_TO_YUV,
            threads=1,
        )

    def _encode(self, frame: Any, tick: int, ticks: int) -> None:
        frame.pts, frame.duration, frame.time_base = tick, ticks, self._stream.codec_context.time_base
        self.container.mux(self._stream.encode(frame))

    def _write_sound(self, until: Fraction) -> None:
        if self.sound:
            self.sound.write(until)

    def write(self, pixels: ByteArray, time: Fraction, duration: Fraction) -> None:
        raise NotImplementedError

    def close(self) -> None:
        try:
            self.container.mux(self._stream.encode(None))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Adds no packet: after an error, libav may crash on the next one."""
        if self.sound:
            self.sound.close()
        self.container.close()


class Mp4(Coded):
    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction, coding: dict[str, str]) -> None:
        super().__init__(path, "mp4", {"movflags": "+faststart"})
        finest = math.lcm(CLOCK, rate.numerator)
        tick = Fraction(1, finest if finest <= 20 * CLOCK else CLOCK)
        self._add_video("libx264", size, rate, tick, **coding)
        context = self._stream.codec_context
        # In order of time, or a reader could not tell how long a frame of a varying rate lasts.
        context.max_b_frames = 0
        context.flags |= av.codec.context.Flags.frame_duration
        context.gop_size = max(1, round(2 * rate))  # two seconds: pages are scrubbed
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        self._next = 0
        self._tick = tick

    def write(self, pixels: ByteArray, time: Fraction, duration: Fraction) -> None:
        begin, end = round(time / self._tick), round((time + duration) / self._tick)
        begin = max(begin, self._next)
        self._next = begin + 1
        self._encode(self._yuv(pixels, Colorspace.ITU709), begin, max(1, end - begin))
        self._write_sound(time + duration)


class Avi(Coded):
    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction) -> None:
        super().__init__(path, "avi", {})
        tick = max((1 / rate).limit_denominator(_MPEG4_CLOCK), Fraction(1, _MPEG4_CLOCK))
        self._add_video("mpeg4", size, 1 / tick, tick)
        context = self._stream.codec_context
        context.codec_tag = "XVID"
        context.qscale = True
        context.global_quality = 3 * 118  # 118 are one step of 31, the first the best
        self._tick = tick
        self._written = 0

    def write(self, pixels: ByteArray, time: Fraction, duration: Fraction) -> None:
        end = round((time + duration) / self._tick)
        if end > self._written:
            frame = self._yuv(pixels, assumed_matrix(self._stream.height))
            for tick in range(self._written, end):
                self._encode(frame, tick, 1)
            self._written = end
        self._write_sound(time + duration)
