"""Frames out: as H.264 that browsers play, as AVI, as GIF or as numbered pictures, written as they come."""

import csv
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from PIL import Image

from dino.runtime.files import write_atomically, writing
from dino.runtime.options import UserError
from dino.video.clip import ByteArray
from dino.video.encoding import CLOCK, Avi, Coded, Mp4
from dino.video.gif import Gif
from dino.video.sound import open_sound

FORMATS = ("mp4", "avi", "gif", "png")

# Pixels that a side may have, by what encodes it.
_LONGEST_SIDE = {"mp4": 16_384, "avi": 8190, "gif": 65_535}

# And what desktops put into a folder that is looked at.
_OWN_OUTPUT = re.compile(r"frame-\d{6,}\.png|frames\.csv|\.DS_Store|Thumbs\.db|desktop\.ini")


class VideoWriter:
    """Writes a clip frame by frame, in constant memory; to be used with `with`.

    The file appears under its name, whole, when the `with` is left without an error. After an error, Ctrl-C
    included, nothing of it remains and what was there before is unchanged.

    mp4: H.264, yuv420p, BT.709; times and durations are kept, to 1/90000 s or better. An odd side is made even
    by repeating the last row or column. avi: MPEG-4 (XVID) with the same padding, at a constant `rate`: frames
    are repeated or left out to keep their times. gif: 256 colours per frame, 1/100 s without drift; frames that
    follow in less than 2/100 s are left out. png: a folder of frame-000001.png, ... and frames.csv with the name,
    time and duration of each; a folder that holds an earlier such clip and nothing else is replaced.

    Args:
        path: the file, or for png the folder.
        size: (rows, cols) of every frame in pixels.
        rate: average frames per second.
        format: one of `FORMATS`; empty takes the suffix of `path`, none being png.
        audio_from: a file whose sound is taken along, if it has some, where the format can hold it (mp4, avi).
        audio_start: what is heard at time 0, in seconds after the first picture of `audio_from`.
        quality: of mp4, as x264's crf: lower is better and larger, 18 looks like the original.
        preset: of mp4, x264's trade of time for size.

    Attributes:
        damage: what was wrong with the sound as one sentence, or "".

    Raises:
        UserError: the format is unknown or cannot hold frames so large, or the file cannot be written, then or
            later.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        rate: Fraction,
        *,
        format: str = "",
        audio_from: Path | None = None,
        audio_start: float | Fraction = 0.0,
        quality: int = 18,
        preset: str = "veryfast",
    ) -> None:
        self.path, self.size = path, size
        self.damage = ""
        self._format = format or path.suffix.lower().lstrip(".") or "png"
        if self._format not in FORMATS:
            raise UserError(
                f"{path} ends in none of .{', .'.join(FORMATS[:-1])}; a name without an ending is a folder of PNGs"
            )
        _check_size(path, size, self._format)
        _check_free(path, is_folder=self._format == "png")
        self._rate = max(Fraction(rate).limit_denominator(CLOCK), Fraction(1, CLOCK))
        self._sound = (audio_from, Fraction(audio_start)) if audio_from else None
        self._coding = {"crf": str(quality), "preset": preset}
        self._temporary = path.with_name(f".{path.name}.part")
        self._sink: _Sink | None = None
        self._last: Fraction | None = None

    def __enter__(self) -> "VideoWriter":
        try:
            with _writing(self.path):
                _remove(self._temporary)
                self._sink = self._open()
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, pixels: ByteArray, time: Fraction, duration: Fraction) -> None:
        """Add a frame.

        Args:
            pixels: (rows, cols, 3) uint8 RGB of the writer's size.
            time: seconds from the clip's beginning, more than the last frame's.
            duration: seconds until the next frame; counts for the last one.
        """
        assert self._sink is not None, "write inside the writer's `with`"
        if pixels.shape != (*self.size, 3):
            raise ValueError(f"frames of this clip have shape {(*self.size, 3)}, got {pixels.shape}")
        if duration <= 0 or (self._last is not None and time <= self._last):
            raise ValueError(f"a frame comes after the one before and lasts: at {time} for {duration} s")
        self._last = time
        try:
            with _writing(self.path):
                self._sink.write(np.ascontiguousarray(pixels), time, duration)
        except BaseException:
            self._abandon()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._finish()
        except BaseException:
            self._abandon()
            raise

    def _open(self) -> "_Sink":
        if self._format == "png":
            return _Pictures(self._temporary)
        self._temporary.open("wb").close()  # libav would find out only at the first frame that it cannot
        if self._format == "gif":
            return Gif(self._temporary, self.size, self._rate)
        if self._format == "avi":
            coded: Coded = Avi(self._temporary, self.size, self._rate)
        else:
            coded = Mp4(self._temporary, self.size, self._rate, self._coding)
        if self._sound:
            coded.sound = open_sound(*self._sound, coded.container, self._format)
        return coded

    def _finish(self) -> None:
        assert self._sink is not None
        if self._last is None:
            raise UserError(f"there is no frame to write to {self.path}")
        with _writing(self.path):
            self._sink.close()
        self.damage = self._sink.damage
        self._sink = None
        if self._format == "png":
            with _writing(self.path):
                _replace_folder(self._temporary, self.path)
        else:
            write_atomically(self.path, self._temporary.replace)

    def _abandon(self) -> None:
        with suppress(Exception):  # the file is thrown away: that it cannot be ended does not matter
            if self._sink is not None:
                self._sink.abandon()
        self._sink = None
        with suppress(OSError):
            _remove(self._temporary)


class _Sink(Protocol):
    @property
    def damage(self) -> str: ...

    def write(self, pixels: ByteArray, time: Fraction, duration: Fraction) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class _Pictures:
    """Numbered PNGs and a table of their times."""

    damage = ""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._table = (folder / "frames.csv").open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._table)
        self._rows.writerow(("name", "time", "duration"))
        self._count = 0

    def write(self, pixels: ByteArray, time: Fraction, duration: Fraction) -> None:
        self._count += 1
        name = f"frame-{self._count:06}.png"
        Image.fromarray(pixels).save(self._folder / name, compress_level=1)
        self._rows.writerow((name, f"{float(time):.6f}", f"{float(duration):.6f}"))

    def close(self) -> None:
        self._table.close()

    abandon = close


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full disk and the like, whether the system's or libav's error, become a sentence."""
    try:
        with writing(path):
            yield
    except av.FFmpegError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _check_size(path: Path, size: tuple[int, int], format: str) -> None:
    rows, cols = size
    longest = _LONGEST_SIDE.get(format)
    if longest is not None and max(size) > longest:
        raise UserError(
            f"{path}: a frame of {format} is at most {longest} pixels wide and high, got {cols} x {rows}; take a "
            "smaller --size, or --video_format png"
        )


def _check_free(path: Path, *, is_folder: bool) -> None:
    """Refuse to write over what is no earlier output of the same kind."""
    if not is_folder:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it, such as {path / 'attention.mp4'}")
        return
    if path.is_dir():
        others = sorted(file.name for file in path.iterdir() if not _OWN_OUTPUT.fullmatch(file.name))
        if others:
            raise UserError(
                f"{path} holds other files, such as {others[0]}; name a new folder for the pictures"
            )
    elif path.exists():
        raise UserError(f"{path} is a file; the pictures need a folder, so give another name")


def _replace_folder(new: Path, path: Path) -> None:
    """Interrupted anywhere, one of the two is whole; `path` is missing for a moment only."""
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    try:
        if path.exists():
            path.replace(old)
        new.replace(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.replace(path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
