"""`dino-attention` for videos: open, look, film, say what it took."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from dino.attention.drawing import Look
from dino.attention.film import FEATURES, Film, FilmReport, SoundTrack, film
from dino.attention.gallery import Gallery
from dino.attention.heads import label
from dino.attention.inputs import Input, printable
from dino.attention.scale import ClipScale, FixedScale, PictureScale, RunningScale, Scale
from dino.attention.video_outputs import Excerpt, file_name, open_source, plan_films, samples
from dino.attention.view import View
from dino.attention.visualize_options import VisualizeOptions
from dino.runtime.files import make_writable
from dino.runtime.options import UserError
from dino.runtime.progress import progress, say
from dino.runtime.remote import download, is_url
from dino.video.clip import FrameSource
from dino.video.frame_folder import FrameFolder
from dino.video.writer import VideoWriter

# Frames that heads and colours are chosen by.
_SAMPLES = 8

# At once: more frames make it no faster, and more pixels may be too many for its memory.
_FRAMES_ON_A_GPU = 8
_PIXELS_ON_A_GPU = 8 * 1280 * 720

_ALL_HEADS = "all"

_STAGES = ("decode", "model", "render", "encode")


class UnreadableVideoError(UserError):
    """A video that cannot be had or opened: one of many is skipped."""


@dataclass(frozen=True)
class VideoDrawing:
    """Draws one video after the other.

    Args:
        image_size: what frames are resized to; None: as they are.
        gallery: None: no page.
    """

    view: View
    look: Look
    options: VisualizeOptions
    image_size: int | tuple[int, int] | None
    gallery: Gallery | None

    def draw(self, what: Input) -> list[str]:
        """Names of the files in the input's folder. Prints what it took, and what was wrong with the video.

        Raises:
            UnreadableVideoError: it cannot be had or opened.
            UserError: a file cannot be written.
        """
        with ExitStack() as stack:
            try:
                file = stack.enter_context(_at_hand(what.place))
                source = stack.enter_context(self._open(what, file))
            except UserError as error:
                raise UnreadableVideoError(str(error)) from error
            if what.kind == "camera":
                say(f"{source.name}: Ctrl-C ends the recording, a second Ctrl-C throws it away")
            make_writable(what.folder, "--output_dir")
            films, report = self._film(what, file, source)
        for line in _report_lines(what, films, report):
            say(line)
        names = [each.path.name for each in films]
        if self.gallery is not None:
            self.gallery.add_video(
                what.name, [(each.path.stem, each.path) for each in films], " ".join(report.damage)
            )
        return names

    def _open(self, what: Input, file: str) -> FrameSource:
        options = self.options
        excerpt = Excerpt(options.start, options.end or None, options.stride)
        return open_source(what, file, excerpt, options.fps, self.image_size)

    def _film(self, what: Input, file: str, source: FrameSource) -> tuple[list[Film], FilmReport]:
        options = self.options
        if self.view.unsettled:
            for sentence in self.view.settle(samples(source, _SAMPLES)):
                say(sentence)
        view = copy(self.view)  # what is added for a video, pictures do not have
        view.restart()
        if options.layout in ("overlay", "side-by-side"):
            view.take_mean_of_several()
        names = _names(view.names(), options)
        for sentence in _left_out(names, options):
            say(sentence)
        films = plan_films(
            names,
            source,
            what.folder,
            layout=options.layout,
            styles=options.draw,
            masks=options.threshold is not None,
            longest=options.size,
            video_format=options.video_format,
            look=self.look,
        )
        with_sound = options.keep_audio and what.kind == "video"
        report = film(
            source,
            view.frame_layers,
            films,
            scale=self._scale(source),
            batch=_batch(view.device, source.size),
            sound=SoundTrack(Path(file), source.begins) if with_sound else None,
        )
        return films, report

    def _scale(self, source: FrameSource) -> Scale:
        options = self.options
        if options.scale:
            return FixedScale((options.scale[0], options.scale[1]))
        if options.normalize == "frame":
            return PictureScale(options.shown)
        if options.normalize == "running" or not source.repeatable:
            return RunningScale(options.shown)
        return ClipScale(options.shown)


@contextmanager
def _at_hand(place: str) -> Iterator[str]:
    """The file, for as long as it is needed: what lies behind a URL is fetched."""
    if not is_url(place):
        yield place
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(download(place, Path(folder)))


def _names(names: list[str], options: VisualizeOptions) -> list[str]:
    """Of the layers those that are drawn: of all heads a grid shows their mean and not their maximum."""
    leaves_out = options.layout == "grid" and options.heads == _ALL_HEADS
    return [name for name in names if not (leaves_out and name == "max")]


def _left_out(names: list[str], options: VisualizeOptions) -> list[str]:
    """What a layout does not show of the heads that were asked for."""
    attention = [name for name in names if name not in FEATURES]
    asked = options.heads != _ALL_HEADS and set(options.draw) != {"colors"}
    if options.layout in ("grid", "separate") or not asked or len(attention) == 1:
        return []
    return [
        f"--layout {options.layout} shows {label(attention[0])} alone; grid and separate show all of --heads "
        f"{options.heads}"
    ]


def _batch(device: torch.device, size: tuple[int, int]) -> int:
    """Frames of (rows, cols) that the network sees at once."""
    if device.type != "cuda":
        return 1
    return max(1, min(_FRAMES_ON_A_GPU, _PIXELS_ON_A_GPU // (size[0] * size[1])))


def make_video_only(folder: str, output_dir: Path, *, fps: float, video_format: str) -> Path:
    """A video of the pictures in a folder as they are.

    Raises:
        UserError: there are none, or it cannot be written.
    """
    path = output_dir / file_name("video", video_format)
    source = FrameFolder(Path(folder), fps=fps)
    make_writable(output_dir, "--output_dir")
    with source, VideoWriter(path, source.size, source.rate, format=video_format) as writer:
        for frame in progress(source, "video", "frame", total=source.length):
            writer.write(frame.pixels, frame.time, frame.duration)
    if source.damage:
        say(source.damage)
    return path


def _report_lines(what: Input, films: list[Film], report: FilmReport) -> list[str]:
    lines = list(report.damage)
    per_frame = {stage: 1000 * report.seconds.get(stage, 0.0) / max(1, report.frames) for stage in _STAGES}
    spent = ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in per_frame.items())
    rate = report.frames / report.elapsed if report.elapsed else 0.0
    files = ", ".join(each.path.name for each in films)
    lines.append(
        f"{printable(what.name)}: {report.frames} frames, {report.duration:.2f} s, into {files}; "
        f"{rate:.1f} frames per second, ms per frame: {spent}"
    )
    return lines
