"""Sound on its way from one file into another."""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from dino.runtime.options import UserError
from dino.video.video_file import VideoFile

# Codecs of sound that are copied as they are: browsers play them from mp4, players from avi.
_COPIED = {"mp4": ("aac", "mp3", "opus", "flac"), "avi": ("mp3", "ac3")}
_SOUND_ENCODER = {"mp4": "aac", "avi": "libmp3lame"}
_SOUND_RATE = 48_000


class Sound:
    """Sound on its way from a file into the container, no further than the pictures are.

    Copied where the container's players know its codec, else encoded anew. Whole packets of it are taken, about
    20 ms each, that lie between the beginning and the end of the pictures.

    Args:
        source: the opened file, `heard` its sound.
        begin: what is heard at time 0, in seconds on the file's clock.
    """

    def __init__(self, source: Any, heard: Any, begin: Fraction, container: Any, form: str) -> None:
        self.damage = ""
        self._source, self._heard, self._begin = source, heard, begin
        self._container = container
        if heard.codec_context.codec.canonical_name in _COPIED[form]:
            self._stream = container.add_stream_from_template(heard)
            self._packets = self._copied()
        else:
            self._stream = container.add_stream(_SOUND_ENCODER[form], rate=_SOUND_RATE)
            self._packets = self._encoded()
        self._next = self._read()

    def write(self, until: Fraction) -> None:
        """Add what ends by then, in seconds."""
        while self._next is not None and _end(self._next) <= until:
            self._container.mux(self._next)
            self._next = self._read()

    def close(self) -> None:
        self._source.close()

    def _read(self) -> Any:
        try:
            # An encoder's run-in lies before its beginning; avi would move the pictures to make room for it.
            return next((packet for packet in self._packets if packet.pts >= 0 and packet.dts >= 0), None)
        except (av.FFmpegError, OSError) as error:
            self.damage = (
                f"the sound of {Path(self._source.name).name} is damaged and ends early: {error.strerror}"
            )
            return None

    def _copied(self) -> Iterator[Any]:
        shift = round(self._begin / self._heard.time_base)
        for packet in self._source.demux(self._heard):
            if packet.pts is None or packet.dts is None or not packet.size:
                continue
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self._stream
            yield packet

    def _encoded(self) -> Iterator[Any]:
        for frame in self._source.decode(self._heard):
            frame.pts -= round(self._begin / frame.time_base)
            if frame.pts >= 0:
                yield from self._stream.encode(frame)
        yield from self._stream.encode(None)


def _end(packet: Any) -> Fraction:
    return Fraction((packet.pts + (packet.duration or 0)) * packet.time_base)


def open_sound(file: Path, start: Fraction, container: Any, form: str) -> Sound | None:
    """The file's sound, `start` seconds after its first picture at time 0; None where it has none."""
    try:
        source: Any = av.open(f"file:{file}", metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the sound of {file}: {error.strerror}") from error
    heard = source.streams.best("audio")
    if heard is None or heard.codec_context is None:
        source.close()
        return None
    with suppress(UserError):  # a file of sound alone counts from its beginning
        start += VideoFile(file).origin
    return Sound(source, heard, start, container, form)
