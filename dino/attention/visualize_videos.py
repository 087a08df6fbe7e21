"""`dino-attention` for videos: open, look, film, say what it took."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from dino.attention.drawing import Look
from dino.attention.film import Film, FilmReport, SoundTrack, film
from dino.attention.gallery import Gallery
from dino.attention.inputs import Input
from dino.attention.scale import ClipScale, FixedScale, PictureScale, RunningScale, Scale
from dino.attention.video_outputs import Excerpt, file_name, open_source, plan_films, samples
from dino.attention.view import View
from dino.attention.visualize_options import VisualizeOptions
from dino.runtime.files import make_writable
from dino.runtime.options import UserError
from dino.runtime.progress import say
from dino.runtime.remote import download, is_url
from dino.video.clip import FrameSource
from dino.video.frame_folder import FrameFolder
from dino.video.writer import VideoWriter

# Frames that heads and colours are chosen by.
_SAMPLES = 8

_FRAMES_ON_A_GPU = 8

_STAGES = ("decode", "model", "render", "encode")


class UnreadableVideoError(UserError):
    """A video that cannot be opened: one of many is skipped."""


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
            UnreadableVideoError: it cannot be opened.
            UserError: a file cannot be written.
        """
        with ExitStack() as stack:
            file = what.place
            if is_url(what.place):
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                file = str(download(what.place, Path(folder)))
            source = stack.enter_context(self._open(what, file))
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
        try:
            return open_source(what, file, excerpt, options.fps, self.image_size)
        except UserError as error:
            raise UnreadableVideoError(str(error)) from error

    def _film(self, what: Input, file: str, source: FrameSource) -> tuple[list[Film], FilmReport]:
        self.view.restart()
        if self.view.unsettled:
            for sentence in self.view.settle(samples(source, _SAMPLES)):
                say(sentence)
        if self.options.layout in ("overlay", "side-by-side"):
            self.view.take_mean_of_several()
        films = plan_films(
            list(self.view.names()),
            source,
            what.folder,
            layout=self.options.layout,
            styles=self.options.draw,
            masks=self.options.threshold is not None,
            longest=self.options.size,
            video_format=self.options.video_format,
            look=self.look,
        )
        with_sound = self.options.keep_audio and what.kind == "video"
        report = film(
            source,
            self.view.frame_layers,
            films,
            scale=self._scale(source),
            batch=_FRAMES_ON_A_GPU if self.view.device.type == "cuda" else 1,
            sound=SoundTrack(Path(file), self.options.start) if with_sound else None,
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


def make_video_only(folder: str, output_dir: Path, *, fps: float, video_format: str) -> Path:
    """A video of the pictures in a folder as they are.

    Raises:
        UserError: there are none, or it cannot be written.
    """
    path = output_dir / file_name("video", video_format)
    source = FrameFolder(Path(folder), fps=Fraction(fps))
    make_writable(output_dir, "--output_dir")
    with source, VideoWriter(path, source.size, source.rate, format=video_format) as writer:
        for frame in source:
            writer.write(frame.pixels, frame.time, frame.duration)
    if source.damage:
        print(source.damage)
    return path


def _report_lines(what: Input, films: list[Film], report: FilmReport) -> list[str]:
    lines = list(report.damage)
    per_frame = {stage: 1000 * report.seconds.get(stage, 0.0) / max(1, report.frames) for stage in _STAGES}
    spent = ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in per_frame.items())
    rate = report.frames / report.elapsed if report.elapsed else 0.0
    files = ", ".join(each.path.name for each in films)
    lines.append(
        f"{what.name}: {report.frames} frames, {report.duration:.2f} s, into {files}; {rate:.1f} frames per second, "
        f"ms per frame: {spent}"
    )
    return lines
