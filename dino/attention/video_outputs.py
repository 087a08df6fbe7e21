"""The files of one video: which films it takes, opened from a file, a folder of frames, or a camera."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from dino.attention.drawing import Look
from dino.attention.film import FEATURES, Film, Painter
from dino.attention.heads import label
from dino.attention.inputs import Input
from dino.attention.layout import Layout
from dino.attention.render import ByteArray
from dino.video.camera import Camera
from dino.video.clip import Frame, FrameSource
from dino.video.frame_folder import FrameFolder
from dino.video.video_file import VideoFile

# A grid of full frames would be too large for a screen and for most players.
_LONGEST_GRID = 1920


@dataclass(frozen=True)
class Excerpt:
    """Which frames of a video: seconds from `start` to `end` (None: to its end), every `stride`-th."""

    start: float = 0.0
    end: float | None = None
    stride: int = 1


class Resized:
    """A source whose frames are resized to (rows, cols), or to a short side."""

    def __init__(self, source: FrameSource, image_size: int | tuple[int, int]) -> None:
        self._source = source
        self.size = _size_for(source.size, image_size)
        self.name, self.rate, self.length = source.name, source.rate, source.length
        self.repeatable = source.repeatable

    @property
    def damage(self) -> str:
        return self._source.damage

    def __enter__(self) -> "Resized":
        self._source.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.__exit__(*exception)

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._source:
            yield replace(frame, pixels=_resized(frame.pixels, self.size))


def open_source(
    what: Input, file: str, excerpt: Excerpt, fps: float, image_size: int | tuple[int, int] | None
) -> FrameSource:
    """The frames of an input that is no picture.

    Args:
        file: where it lies now, when it was downloaded; else its place.
        fps: frames per second of a folder of frames.

    Raises:
        UserError: it cannot be opened or has no frames.
    """
    source: FrameSource
    if what.kind == "camera":
        source = Camera(int(what.place), seconds=excerpt.end, stride=excerpt.stride)
    elif what.kind == "frames":
        source = FrameFolder(
            Path(file), fps=Fraction(fps), start=excerpt.start, end=excerpt.end, stride=excerpt.stride
        )
    else:
        source = VideoFile(Path(file), start=excerpt.start, end=excerpt.end, stride=excerpt.stride)
    return source if image_size is None else Resized(source, image_size)


def samples(source: FrameSource, count: int) -> list[ByteArray]:
    """A few frames spread over the source; of one that cannot be repeated, the first."""
    stride = max(1, (source.length or count) // count)
    frames: list[ByteArray] = []
    for index, frame in enumerate(source):
        if index % stride == 0:
            frames.append(frame.pixels)
        if len(frames) == count or not source.repeatable:
            break
    return frames


def plan_films(
    names: Sequence[str],
    source: FrameSource,
    folder: Path,
    *,
    layout: str,
    styles: tuple[str, ...],
    masks: bool,
    longest: int,
    video_format: str,
    look: Look,
) -> list[Film]:
    """The films that a layout takes, each in every style; masks have a film of their own.

    Args:
        names: of the layers, in order.
        masks: also a film of masks.
        longest: side in pixels of what is written; 0: the frames' own, and for a grid what fits a screen.
    """
    if not styles:
        styles = ("overlay",) if layout in ("overlay", "separate") else ("heat",)
    many = len(styles) > 1
    films: list[Film] = []
    for style in [*styles, *(["mask"] if masks and "mask" not in styles else [])]:
        stem = f"mask_th{look.threshold}" if style == "mask" else f"video-{style}" if many else "video"
        for suffix, panels in _panels(layout, style, names):
            original = layout in ("side-by-side", "grid")
            labels = [label(name) for name in panels]
            labels = ["picture", *labels] if original else labels
            columns = 2 if layout == "side-by-side" else 0
            arranged = Layout(
                labels if layout == "grid" else [""] * len(labels),
                source.size,
                longest=longest or (_LONGEST_GRID if layout == "grid" else 0),
                columns=columns,
            )
            path = folder / file_name(stem + suffix, video_format)
            films.append(Film(path, Painter(look, style, panels, original, arranged), video_format))
    return films


def _panels(layout: str, style: str, names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """For each film of a layout the end of its name, and its panels."""
    if style == "colors":  # all heads in one picture
        return [("", ("colors",))]
    if layout == "separate":
        return [(f"-{name}", (name,)) for name in names]
    if layout == "grid":
        return [("", tuple(name for name in names if name != "max" or "mean" not in names))]
    attention = [name for name in names if name not in FEATURES]
    features = [(f"-{name}", (name,)) for name in names if name in FEATURES]
    return [("", (attention[0],)), *features]


def file_name(stem: str, video_format: str) -> str:
    """Of a video; frames as PNG lie in a folder."""
    return stem if video_format == "png" else f"{stem}.{video_format}"


def _size_for(size: tuple[int, int], image_size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(image_size, tuple):
        return image_size
    scale = image_size / min(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(pixels: ByteArray, size: tuple[int, int]) -> ByteArray:
    if pixels.shape[:2] == size:
        return pixels
    method = cv2.INTER_AREA if size[0] <= pixels.shape[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (size[1], size[0]), interpolation=method), np.uint8)
