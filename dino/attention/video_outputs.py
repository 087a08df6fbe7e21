"""The files of one video: which films it takes, opened from a file, a folder of frames, or a camera."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from dino.attention.drawing import Look
from dino.attention.film import FEATURES, Film, Painter
from dino.attention.heads import label
from dino.attention.inputs import Input
from dino.attention.layout import Layout
from dino.attention.render import ByteArray
from dino.runtime.images import MAX_PIXELS
from dino.runtime.options import UserError
from dino.video.camera import Camera
from dino.video.clip import Frame, FrameSource
from dino.video.frame_folder import FrameFolder
from dino.video.video_file import VideoFile

# A grid of full frames would be too large for a screen and for most players.
_LONGEST_GRID = 1920

# Layouts whose first panel is the frame itself.
_WITH_PICTURE = ("side-by-side", "grid")


@dataclass(frozen=True)
class Excerpt:
    """Which frames of a video: seconds from `start` to `end` (None: to its end), every `stride`-th."""

    start: float = 0.0
    end: float | None = None
    stride: int = 1


class Resized:
    """A source whose frames are resized to (rows, cols), or to a short side.

    Raises:
        UserError: that is larger than pictures may be.
    """

    def __init__(self, source: FrameSource, image_size: int | tuple[int, int]) -> None:
        self._source = source
        self.size = rows, cols = _size_for(source.size, image_size)
        if rows * cols > MAX_PIXELS:
            raise UserError(
                f"{source.name} resized to {cols} x {rows} would have frames of {rows * cols / 1e6:.0f} Mpx, the limit "
                f"is {MAX_PIXELS / 1e6:.0f} Mpx: name a smaller --image_size"
            )
        self.name, self.rate, self.length = source.name, source.rate, source.length
        self.begins, self.repeatable = source.begins, source.repeatable

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
        source = Camera(int(what.place), **asdict(excerpt))
    elif what.kind == "frames":
        source = FrameFolder(Path(file), fps=fps, **asdict(excerpt))
    else:
        source = VideoFile(Path(file), **asdict(excerpt))
    return source if image_size is None else Resized(source, image_size)


def samples(source: FrameSource, count: int) -> Iterator[ByteArray]:
    """A few frames spread over the source; of one that cannot be repeated, the first."""
    stride = max(1, (source.length or count) // count)
    last = (count - 1) * stride if source.repeatable else 0
    for frame in islice(source, 0, last + 1, stride):
        yield frame.pixels


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
        styles: in place of what suits the layout.
        masks: also a film of masks.
        longest: side in pixels of what is written; 0: the frames' own, and for a grid what fits a screen.
    """
    usual = ("overlay",) if layout in ("overlay", "separate") else ("heat",)
    styles = tuple(dict.fromkeys(styles)) or usual
    many = len(styles) > 1
    films: list[Film] = []
    for style in dict.fromkeys([*styles, "mask"] if masks else styles):
        stem = f"mask_th{look.threshold}" if style == "mask" else f"video-{style}" if many else "video"
        for suffix, panels in _panels(layout, style, names):
            arranged = _arranged(layout, panels, source.size, longest)
            painter = Painter(look, style, panels, layout in _WITH_PICTURE, arranged)
            films.append(Film(folder / file_name(stem + suffix, video_format), painter, video_format))
    return films


def _arranged(layout: str, panels: Sequence[str], size: tuple[int, int], longest: int) -> Layout:
    labels = [*(["picture"] if layout in _WITH_PICTURE else []), *map(label, panels)]
    if layout == "grid":
        return Layout(labels, size, longest=longest or _LONGEST_GRID)
    return Layout([""] * len(labels), size, longest=longest, columns=len(labels))


def _panels(layout: str, style: str, names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """For each film of a layout the end of its name, and its panels."""
    if style == "colors":  # all heads in one picture
        return [("", ("colors",))]
    if layout == "separate":
        return [(f"-{name}", (name,)) for name in names]
    if layout == "grid":
        return [("", tuple(names))]
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
