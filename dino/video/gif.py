"""Frames as GIF."""

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from dino.video.clip import ByteArray

# Browsers show a GIF's picture for 10 of these, hundredths of a second, where it asks for fewer than 2.
_SHORTEST_GIF_DELAY = 2

# A GIF has 16 bits for it.
_LONGEST_GIF_DELAY = 65_535


class Gif:
    """Each frame with a palette of its own, made and applied by libav's filters."""

    damage = ""

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction) -> None:
        self._path = path
        self._container: Any = av.open(f"file:{path}", "w", format="gif")
        self._stream: Any = self._container.add_stream("gif", rate=rate)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "pal8"
        self._tick = self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, 100)
        self._palette = _palette_filter(size, self._tick)
        self._begin: int | None = None
        self._end = 0

    def write(self, pixels: ByteArray, time: Fraction, duration: Fraction) -> None:
        begin = round(time / self._tick)
        self._end = round((time + duration) / self._tick)
        if self._begin is not None and begin < self._begin + _SHORTEST_GIF_DELAY:
            return
        self._begin = begin
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.pts, frame.time_base = begin, self._tick
        self._palette.push(frame)
        self._encode()

    def close(self) -> None:
        try:
            self._palette.push(None)
            self._encode()
            self._container.mux(self._stream.encode(None))
        finally:
            self.abandon()
        self._set_last_delay()

    def abandon(self) -> None:
        self._container.close()

    def _encode(self) -> None:
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                self._container.mux(self._stream.encode(self._palette.pull()))

    def _set_last_delay(self) -> None:
        """libav's writer takes it for the whole file, before the first frame; so the frames are copied."""
        assert self._begin is not None
        delay = min(max(_SHORTEST_GIF_DELAY, self._end - self._begin), _LONGEST_GIF_DELAY)
        whole = self._path.with_name(f"{self._path.name}2")
        try:
            with (
                av.open(f"file:{self._path}") as source,
                av.open(f"file:{whole}", "w", format="gif", options={"final_delay": str(delay)}) as container,
            ):
                stream = container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        container.mux(packet)
            whole.replace(self._path)
        finally:
            whole.unlink(missing_ok=True)


def _palette_filter(size: tuple[int, int], tick: Fraction) -> Any:
    """A graph that RGB frames are pushed into, and pulled out of with a palette each."""
    graph = av.filter.Graph()
    into = graph.add_buffer(width=size[1], height=size[0], format=av.VideoFormat("rgb24"), time_base=tick)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single")
    # A fixed pattern: dither that spreads errors flickers where nothing moves.
    apply = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=5:diff_mode=rectangle")
    out = graph.add("buffersink")
    into.link_to(split)
    split.link_to(apply, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(apply, 0, 1)
    apply.link_to(out)
    graph.configure()
    return graph
