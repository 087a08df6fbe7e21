"""How fast is an attention video made, where does the time go, and does memory grow with its length?

python benchmarks/attention_video.py --video clip.mp4 --output benchmarks/results/attention_video.json

Without --video on a clip of 1280 x 720 that is made up. Each film is made in a fresh process, by the command itself.
For the memory, clips of 60 and of 600 seconds at 25 frames per second, small and before a small network, so that
they differ in nothing but their length.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import Comparison, ComparisonOptions, isolated, peak_megabytes
from dino.attention.film import FilmReport
from dino.attention.visualize_options import LAYOUTS, VisualizeOptions
from dino.evaluation.results import provenance
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option
from dino.video.writer import VideoWriter

_RATE = Fraction(25)
_SMALL = (96, 128)
_LARGE = (720, 1280)
_MADE_UP_SECONDS = 2
# The largest part of a frame's time that everything but the network may take, as a ratio.
_TARGET = 5.0


@dataclass(frozen=True)
class FilmingOptions(ComparisonOptions):
    video: str = option("", "A video to time; empty = two seconds of a made-up one of 1280 x 720.")
    arch: str = option("xcit_small_12_p16", "Backbone that is timed, with random weights.")
    layouts: tuple[str, ...] = option(("overlay", "grid"), f"To time, of {', '.join(LAYOUTS)}.")
    precision: str = option("auto", "Of the network.", choices=("auto", "fp32", "bf16", "fp16"))
    device: str = option("auto", "Where the network runs.")
    end: float = option(0.0, "Seconds of the video; 0 = all.")
    lengths: tuple[int, ...] = option((60, 600), "Seconds of the clips for the memory; none = no such clips.")
    turns: int = option(1, "Films of each layout; the last one's numbers are shown.")


def measure(options: FilmingOptions) -> None:
    if options.turns < 1:
        raise UserError(f"--turns must be 1 or more, got {options.turns}")
    if not all(layout in LAYOUTS for layout in options.layouts) or any(
        length < 1 for length in options.lengths
    ):
        raise UserError(f"--layouts are of {', '.join(LAYOUTS)}, --lengths are 1 or more")
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = {"speed": _speed(folder, options), "memory": _memory(folder, options)}
    if options.output:
        import torch

        from dino.runtime.distributed import describe, pick_device

        about = {
            **provenance(),
            "machine": describe(torch.device("cpu")),
            "device": describe(pick_device(options.device)),
        }
        text = json.dumps({**about, "options": asdict(options), **report}, indent=1) + "\n"
        write_atomically(Path(options.output), lambda temporary: temporary.write_text(text))


def comparisons(options: FilmingOptions) -> Iterator[Comparison]:
    """For each layout a frame's whole time against that of all stages but the network, which in truth overlap."""
    with tempfile.TemporaryDirectory() as name:
        for layout, films in _films(Path(name), options):
            stages = [film["ms_per_frame"] for film in films]
            yield Comparison(
                f"attention video, {options.arch}, {layout}: frame, all but the network",
                "ms",
                theirs=[1000 / film["frames_per_second"] for film in films],
                ours=[sum(stage.values()) - stage["model"] for stage in stages],
                peer="the whole frame's time: a part of 1 / ratio is not the network's",
                precision=options.precision,
                target=_TARGET,
                note=f"network {stages[-1]['model']:.0f} ms",
            )


def _speed(folder: Path, options: FilmingOptions) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for layout, films in _films(folder, options):
        measured[layout] = films[-1]
        name = Path(options.video).name or "made-up video"
        print(f"{options.arch}, {name}, {layout}: {_line(films[-1])}", flush=True)
    return measured


def _films(folder: Path, options: FilmingOptions) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Of every layout, what each film of it took."""
    video = Path(options.video) if options.video else folder / "large.mp4"
    if not options.video:
        _make_clip(video, _LARGE, _MADE_UP_SECONDS)
    for layout in options.layouts:
        asked = VisualizeOptions(
            input=(str(video),),
            arch=options.arch,
            pretrained_weights="random",
            precision=options.precision,
            device=options.device,
            end=options.end,
            layout=layout,
            output_dir=str(folder / layout),
        )
        yield layout, [isolated(_film, asked) for _ in range(options.turns)]


def _memory(folder: Path, options: FilmingOptions) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for length in options.lengths:
        clip = folder / f"{length}.mp4"
        _make_clip(clip, _SMALL, length)
        asked = VisualizeOptions(
            input=(str(clip),),
            arch="xcit_pico_3_p8",
            pretrained_weights="random",
            device="cpu",
            output_dir=str(folder / str(length)),
        )
        measured[f"{length} s"] = isolated(_film, asked)
        print(f"{length} s of video: {_line(measured[f'{length} s'])}", flush=True)
    return measured


def _film(options: VisualizeOptions) -> dict[str, Any]:
    """Make a film, and tell what it took."""
    from dino.attention import visualize, visualize_videos

    reports: list[FilmReport] = []
    film = visualize_videos.film

    def noted(*arguments: Any, **named: Any) -> FilmReport:
        reports.append(film(*arguments, **named))
        return reports[-1]

    visualize_videos.film = noted
    visualize.run(options)
    (report,) = reports
    return {
        "frames": report.frames,
        "seconds_of_video": report.duration,
        "frames_per_second": report.frames / report.elapsed,
        "ms_per_frame": {stage: 1000 * spent / report.frames for stage, spent in report.seconds.items()},
        "peak_resident_gb": peak_megabytes() / 1000,
    }


def _make_clip(path: Path, size: tuple[int, int], seconds: int) -> None:
    """A smooth ground, over which a noisy square moves."""
    random = np.random.default_rng(0)
    rows, cols = size
    ground = np.linspace(40, 160, rows * cols * 3).reshape(rows, cols, 3).astype(np.uint8)
    side = rows // 3
    square = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
    with VideoWriter(path, size, _RATE) as writer:
        for index in range(int(seconds * _RATE)):
            frame = ground.copy()
            left = 2 * index % (cols - side)
            frame[side : 2 * side, left : left + side] = square
            writer.write(frame, index / _RATE, 1 / _RATE)


def _line(measured: dict[str, Any]) -> str:
    stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in measured["ms_per_frame"].items())
    return (
        f"{measured['frames']} frames, {measured['frames_per_second']:.1f} per second, peak "
        f"{measured['peak_resident_gb']:.2f} GB; ms per frame: {stages}"
    )


if __name__ == "__main__":
    command(FilmingOptions, measure, prog="benchmarks/attention_video.py", description=__doc__ or "")
