"""Attention along a video: frames in, maps, drawn frames out, all at the same time and in constant memory.

    with VideoFile(file) as source:
        report = film(source, layers_of, [Film(path, painter)], scale=ClipScale((0, 99.5)))

Knows nothing of the network: `layers_of` turns frames into layers.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.attention.drawing import Look, Picture
from dino.attention.layout import Layout
from dino.attention.render import ByteArray, FloatArray
from dino.attention.scale import ClipScale, Scale
from dino.runtime.ahead import Ahead, Stopwatch
from dino.runtime.files import writing
from dino.runtime.progress import progress
from dino.video.clip import Frame, FrameSource
from dino.video.writer import VideoWriter

FEATURES = ("similarity", "pca")

# Of one frame, by name: maps (R, C), and for `pca` colours (R, C, 3).
FrameLayers = Mapping[str, FloatArray]
LayersOf = Callable[[ByteArray], Sequence[FrameLayers]]

_FRAMES_AHEAD = 3


@dataclass(frozen=True)
class Painter:
    """From a frame and its layers to a frame of the video.

    Args:
        names: of the layers drawn, each in a panel.
        original: a first panel shows the frame itself.
    """

    look: Look
    style: str
    names: tuple[str, ...]
    original: bool
    layout: Layout

    def __call__(self, picture: Picture) -> ByteArray:
        panels = [picture.image] if self.original else []
        return self.layout([*panels, *(self.look.panel(self.style, name, picture) for name in self.names)])


@dataclass(frozen=True)
class Film:
    """A video to write, in one of `video_out.FORMATS`, and what draws its frames."""

    path: Path
    painter: Painter
    format: str = "mp4"


@dataclass
class FilmReport:
    """What filming took.

    Attributes:
        seconds: each stage's own, waiting not counted: decode, model, render, encode.
        duration: of the video in seconds.
        elapsed: of the clock; less than the stages together, since they overlap.
        damage: what is wrong with the source or its sound, in sentences.
    """

    frames: int = 0
    duration: float = 0.0
    elapsed: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SoundTrack:
    """Of a file, from `start` seconds on."""

    file: Path
    start: float = 0.0


def film(
    source: FrameSource,
    layers_of: LayersOf,
    films: Sequence[Film],
    *,
    scale: Scale,
    batch: int = 1,
    sound: SoundTrack | None = None,
) -> FilmReport:
    """Write videos of a source's layers: as many frames, with the same times.

    A `ClipScale` takes two passes over the source: the network looks at every frame once and its maps wait in a
    temporary file beside the output, then the frames are decoded again and drawn. Otherwise one pass does all.

    Args:
        layers_of: frames (B, rows, cols, 3) of one size to the layers of each.
        batch: frames that the network sees at once.

    Raises:
        UserError: an output cannot be written; nothing half-written stays under its name.
    """
    watch, began = Stopwatch(), time.perf_counter()
    with ExitStack() as stack:
        looked_at = _looked_at(source, layers_of, batch, watch)
        damage = ""
        if isinstance(scale, ClipScale):
            store = stack.enter_context(LayerStore(films[0].path.parent))
            for _, layers in _progress(looked_at, source, "looking at"):
                store.append(layers)
                scale.see(layers)
            damage = source.damage
            looked_at = zip(watch.items("decode", source), store, strict=False)
        report = _draw(looked_at, source, films, scale, watch, sound)
    report.damage = [sentence for sentence in (damage or source.damage, *report.damage) if sentence]
    report.elapsed = time.perf_counter() - began
    return report


def _looked_at(
    source: FrameSource, layers_of: LayersOf, batch: int, watch: Stopwatch
) -> Iterator[tuple[Frame, FrameLayers]]:
    with Ahead(watch.items("decode", source), _FRAMES_AHEAD + batch) as frames:
        iterator = iter(frames)
        while together := list(islice(iterator, batch)):
            layers = watch.call("model", layers_of, np.stack([frame.pixels for frame in together]))
            yield from zip(together, layers, strict=True)


def _draw(
    looked_at: Iterator[tuple[Frame, FrameLayers]],
    source: FrameSource,
    films: Sequence[Film],
    scale: Scale,
    watch: Stopwatch,
    sound: SoundTrack | None,
) -> FilmReport:
    report = FilmReport(seconds=watch.seconds)
    with ExitStack() as stack:
        writers = [stack.enter_context(_writer(each, source, sound)) for each in films]
        mapped = stack.enter_context(Ahead(looked_at, _FRAMES_AHEAD))
        drawn = stack.enter_context(Ahead(_painted(mapped, films, scale, watch), _FRAMES_AHEAD))
        try:
            for frame, pictures in _progress(drawn, source, "drawing"):
                for writer, pixels in zip(writers, pictures, strict=True):
                    watch.call("encode", writer.write, pixels, frame.time, frame.duration)
                report.frames += 1
                report.duration = float(frame.time + frame.duration)
        except KeyboardInterrupt:
            if source.repeatable:
                raise
            # A camera has no other end: what was recorded is kept.
    report.damage = list(dict.fromkeys(writer.damage for writer in writers))
    return report


def _writer(each: Film, source: FrameSource, sound: SoundTrack | None) -> VideoWriter:
    audio_from, audio_start = (sound.file, sound.start) if sound else (None, 0.0)
    size = each.painter.layout.size
    return VideoWriter(
        each.path, size, source.rate, format=each.format, audio_from=audio_from, audio_start=audio_start
    )


def _painted(
    looked_at: Iterable[tuple[Frame, FrameLayers]], films: Sequence[Film], scale: Scale, watch: Stopwatch
) -> Iterator[tuple[Frame, list[ByteArray]]]:
    for frame, layers in looked_at:
        yield frame, watch.call("render", _paint, frame, layers, films, scale)


def _paint(frame: Frame, layers: FrameLayers, films: Sequence[Film], scale: Scale) -> list[ByteArray]:
    picture = _picture(frame, layers, scale)
    return [each.painter(picture) for each in films]


def _picture(frame: Frame, layers: FrameLayers, scale: Scale) -> Picture:
    weights = {name: layer for name, layer in layers.items() if name not in FEATURES}
    features: dict[str, NDArray[Any]] = {name: layers[name] for name in FEATURES if name in layers}
    if "pca" in features:
        features["pca"] = features["pca"].astype(np.uint8)
    return Picture(frame.pixels, weights, scale(weights, float(frame.time)), features)


def _progress(items: Iterable[Any], source: FrameSource, what: str) -> Iterable[Any]:
    return progress(items, f"{what} {source.name}", "frame", total=source.length)


class LayerStore:
    """Layers of frames in a temporary file, read back in the order that they came in.

    The file has no name, so that nothing is left of it whatever happens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> "LayerStore":
        with writing(self._folder):
            self._file = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, layers: FrameLayers) -> None:
        """Raises: UserError: the disk is full."""
        self._shapes = self._shapes or {name: layer.shape for name, layer in layers.items()}
        with writing(self._folder):
            for layer in layers.values():
                self._file.write(np.ascontiguousarray(layer, np.float32).tobytes())

    def __iter__(self) -> Iterator[dict[str, FloatArray]]:
        with writing(self._folder):
            self._file.seek(0)
        sizes = {name: 4 * int(np.prod(shape)) for name, shape in self._shapes.items()}
        while block := self._file.read(sum(sizes.values())):
            layers: dict[str, FloatArray] = {}
            for name, shape in self._shapes.items():
                layers[name] = np.frombuffer(block[: sizes[name]], np.float32).reshape(shape)
                block = block[sizes[name] :]
            yield layers
