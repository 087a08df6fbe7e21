"""Sound on its way from one file into another."""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from dino.runtime.options import UserError
from dino.video.video_file import VideoFile

# Codecs of sound that are copied as they are, since browsers play them. An avi knows no times of its sound, so that
# all of it, silence too, has to be there.
_COPIED = {"mp4": ("aac", "mp3", "opus", "flac"), "avi": ()}
_SOUND_ENCODER = {"mp4": "aac", "avi": "libmp3lame"}
_SOUND_RATE = 48_000

# Seconds that times jump back by where a second recording begins; less is damage.
_ANOTHER_RECORDING = 1


class Sound:
    """Sound on its way from a file into the container, no further than the pictures are.

    Copied where the container's players know its codec, else encoded anew. Whole packets of it are taken, about
    20 ms each, that lie between the beginning and the end of the pictures. Those that are not later than the one
    before are left out, and what begins anew, as a second recording in the file does, goes on behind the first.

    Args:
        source: the opened file, `heard` its sound.
        begin: what is heard at time 0, in seconds on the file's clock.
    """

    def __init__(self, source: Any, heard: Any, begin: Fraction, container: Any, form: str) -> None:
        self.damage = ""
        self._source, self._heard, self._begin = source, heard, begin
        self._container = container
        self._last: int | None = None  # in ticks of the file's clock
        self._over = Fraction(0)
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
        for packet in self._source.demux(self._heard):
            if packet.pts is None or not packet.size:
                continue
            moved = self._moved(packet.dts, packet.duration or 0, packet.time_base)
            if moved is not None:
                packet.pts, packet.dts = packet.pts - packet.dts + moved, moved
                packet.stream = self._stream
                yield packet

    def _encoded(self) -> Iterator[Any]:
        graph: Any = None
        for frame in self._source.decode(self._heard):
            lasts = round(frame.samples / frame.sample_rate / frame.time_base)
            frame.pts = self._moved(frame.pts, lasts, frame.time_base)
            if frame.pts is not None and frame.pts + lasts > 0:
                graph = graph or _without_gaps(frame)
                graph.push(frame)
                for whole in _pulled(graph):
                    yield from self._stream.encode(whole)
        yield from self._stream.encode(None)

    def _moved(self, stamp: int | None, ticks: int, tick: Fraction) -> int | None:
        """A time of the file's clock on that of the pictures, in ticks; None for what is left out."""
        if stamp is None:
            return None
        moved = stamp - round(self._begin / tick)
        if self._last is not None and moved * tick < self._over - _ANOTHER_RECORDING:
            self._begin += moved * tick - self._over
            moved = stamp - round(self._begin / tick)
        if self._last is not None and moved <= self._last:
            return None
        self._last, self._over = moved, (moved + ticks) * tick
        return moved


def _end(packet: Any) -> Fraction:
    return Fraction((packet.pts + (packet.duration or 0)) * packet.time_base)


def _without_gaps(like: Any) -> Any:
    """A graph that makes of frames in time sound from 0 on, with silence where none of them is."""
    graph = av.filter.Graph()
    into = graph.add_abuffer(
        format=like.format, sample_rate=like.sample_rate, layout=like.layout, time_base=like.time_base
    )
    graph.link_nodes(into, graph.add("aresample", "async=1:first_pts=0"), graph.add("abuffersink"))
    graph.configure()
    return graph


def _pulled(graph: Any) -> Iterator[Any]:
    with suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()


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
