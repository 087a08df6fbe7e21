"""Attention along a video: frames in, maps, drawn frames out, all at the same time and in constant memory.

    with VideoFile(file) as source:
        report = film(source, layers_of, [Film(path, painter)], scale=ClipScale((0, 99.5)))

Knows nothing of the network: `layers_of` turns frames into layers.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.attention.drawing import Look, Picture
from dino.attention.layer_store import LayerStore
from dino.attention.layout import Layout, on_ground
from dino.attention.render import ByteArray, FloatArray
from dino.attention.scale import ClipScale, Scale
from dino.runtime.ahead import Ahead, Stopwatch
from dino.runtime.options import UserError
from dino.runtime.progress import progress
from dino.video.clip import Frame, FrameSource
from dino.video.writer import VideoWriter

FEATURES = ("similarity", "pca")

# Of one frame, by name: maps (R, C), and for `pca` colours (R, C, 3).
FrameLayers = Mapping[str, FloatArray]
LayersOf = Callable[[ByteArray], Sequence[FrameLayers]]

LookedAt = Generator[tuple[Frame, FrameLayers], None, None]

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
        drawn = (self.look.panel(self.style, name, picture) for name in self.names)
        return self.layout([*panels, *(on_ground(panel) for panel in drawn)])

    def needs(self, layer: str) -> bool:
        """Whether anything of the layer is in the picture."""
        return self.style == "colors" or layer in self.names


@dataclass(frozen=True)
class Film:
    """A video to write, in one of `video.writer.FORMATS`, and what draws its frames."""

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
    """Of a file, from `start` seconds after its first picture on."""

    file: Path
    start: Fraction = Fraction(0)


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

    def needed(images: ByteArray) -> list[FrameLayers]:
        return [_needed(layers, films) for layers in layers_of(images)]

    looked_at = _looked_at(source, needed, batch, watch)
    damage = ""
    with ExitStack() as stack:
        # Opened before the work: what cannot be written is refused now.
        writers = [stack.enter_context(_writer(each, source, sound)) for each in films]
        if isinstance(scale, ClipScale):
            store = stack.enter_context(LayerStore(films[0].path.parent))
            damage = _see(looked_at, source, scale, store)
            looked_at = _together(watch.items("decode", source), store, source.name)
        report = _draw(looked_at, source, films, writers, scale, watch)
    damages = dict.fromkeys([damage or source.damage, *(writer.damage for writer in writers)])
    report.damage = [sentence for sentence in damages if sentence]
    report.elapsed = time.perf_counter() - began
    return report


def _needed(layers: FrameLayers, films: Sequence[Film]) -> FrameLayers:
    return {name: each for name, each in layers.items() if any(film.painter.needs(name) for film in films)}


def _looked_at(source: FrameSource, layers_of: LayersOf, batch: int, watch: Stopwatch) -> LookedAt:
    with Ahead(watch.items("decode", source), _FRAMES_AHEAD + batch) as frames:
        iterator = iter(frames)
        while together := list(islice(iterator, batch)):
            layers = watch.call("model", layers_of, np.stack([frame.pixels for frame in together]))
            yield from zip(together, layers, strict=True)


def _see(looked_at: LookedAt, source: FrameSource, scale: ClipScale, store: LayerStore) -> str:
    """The first of two passes; what was wrong with the source in it."""
    with closing(looked_at):
        for frame, layers in _progress(looked_at, source, "looking at"):
            store.append(frame.time, layers)
            scale.see(layers)
    return source.damage


def _together(frames: Iterable[Frame], store: LayerStore, name: str) -> LookedAt:
    """The frames of the second pass with their layers of the first."""
    kept = iter(store)
    for frame in frames:
        seconds, layers = next(kept, (None, {}))
        if seconds != float(frame.time):
            break
        yield frame, layers
    else:
        if next(kept, None) is None:
            return
    raise UserError(
        f"{name} changed while it was drawn: its frames are others than when it was looked at; draw it again, or in "
        "one pass with --normalize running"
    )


def _draw(
    looked_at: LookedAt,
    source: FrameSource,
    films: Sequence[Film],
    writers: Sequence[VideoWriter],
    scale: Scale,
    watch: Stopwatch,
) -> FilmReport:
    report = FilmReport(seconds=watch.seconds)
    with (
        Ahead(looked_at, _FRAMES_AHEAD) as mapped,
        Ahead(_painted(mapped, films, scale, watch), _FRAMES_AHEAD) as drawn,
    ):
        for frame, pictures in _progress(drawn, source, "drawing"):
            for writer, pixels in zip(writers, pictures, strict=True):
                watch.call("encode", writer.write, pixels, frame.time, frame.duration)
            report.frames += 1
            report.duration = float(frame.time + frame.duration)
    return report


def _writer(each: Film, source: FrameSource, sound: SoundTrack | None) -> VideoWriter:
    audio_from, audio_start = (sound.file, sound.start) if sound else (None, Fraction(0))
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
