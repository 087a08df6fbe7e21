"""A real pre-training on JPEGs: pictures per second, and how much of the time the GPU waits.

A part of `benchmarks/gpu.py`, which runs it.
"""

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.comparison import Comparison
from dino.distillation import Rates, SelfDistillation
from dino.pretraining import pretrain
from dino.runtime.distributed import usable_cores
from dino.step_result import StepResult
from dino.train_options import TrainOptions

_SIZE = (500, 375)
_DIFFERENT = 1024  # files; the others are further names of them, read and decoded like any
_PROFILED_STEPS = 5
_GOAL_RATE = 2000
_GOAL_IDLE = 3.0  # percent


@dataclasses.dataclass
class Trace:
    """Of the steps of a run.

    Attributes:
        began: seconds on the clock at which the host came to each step.
        marks: on CUDA, events of the GPU before and after each step.
        waited: seconds between steps in which the GPU had nothing to do.
        busy: of `_PROFILED_STEPS` steps, the share of the time in which it computed; None = not known.
    """

    began: list[float] = dataclasses.field(default_factory=list)
    marks: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    busy: float | None = None

    def seconds(self, settled: int) -> float:
        """For a step, on average, without the first ones."""
        return (self.began[-1] - self.began[settled]) / (len(self.began) - 1 - settled)

    def waiting_share(self, settled: int) -> float:
        """Of the time, the part between steps; 0 where there is no GPU to ask."""
        if len(self.marks) <= settled + 1:
            return 0.0
        torch.cuda.synchronize()
        kept = self.marks[settled:]
        gaps = sum(before[1].elapsed_time(after[0]) for before, after in itertools.pairwise(kept))
        return gaps / kept[0][0].elapsed_time(kept[-1][0])


def pretraining_comparisons(
    options: TrainOptions, data_path: str, steps: int, settled: int
) -> Iterator[Comparison]:
    """Two rows against the goals.

    Args:
        options: those that are not of the paper.
        data_path: folder of JPEGs; empty = made up ones.
        steps: to train.
        settled: first steps, which do not count: of a compiled network they take minutes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not data_path:
            data_path = str(folder / "pictures")
            write_jpegs(Path(data_path), steps * options.batch_size_per_gpu)
        run = _of_length(options, data_path, folder / "run")
        with traced(first_profiled=settled) as trace:
            pretrain(run)
    batch = options.batch_size_per_gpu
    rate = batch / trace.seconds(settled)
    waiting = trace.waiting_share(settled)
    note = f"{rate:.0f} pictures/s of {batch} at once, {options.num_workers} loading processes"
    yield Comparison(
        f"pre-training, {options.arch}, real JPEGs, per 1000 pictures",
        "ms",
        [1e6 / _GOAL_RATE],
        [1e6 / rate],
        peer=f"goal: {_GOAL_RATE} pictures/s",
        precision="bf16",
        target=1.0,
        note=note,
    )
    if trace.busy is None:
        return
    idle = 1 - (1 - waiting) * trace.busy
    yield Comparison(
        f"pre-training, {options.arch}, GPU idle",
        "%",
        [_GOAL_IDLE],
        [100 * max(idle, 1e-6)],
        peer=f"goal: less than {_GOAL_IDLE:g} %",
        precision="bf16",
        target=1.0,
        note=f"between steps {waiting:.1%}, within steps {1 - trace.busy:.1%}",
    )


def _of_length(options: TrainOptions, data_path: str, folder: Path) -> TrainOptions:
    return dataclasses.replace(
        options,
        data_path=data_path,
        output_dir=str(folder),
        epochs=1,
        warmup_epochs=0,
        freeze_last_layer=0,
        saveckp_freq=0,
        save_every_minutes=0.0,
        knn_freq=0,
    )


@contextmanager
def traced(first_profiled: int) -> Iterator[Trace]:
    """Steps in here are noted; those after so many, and as many as fit into a profile, are profiled."""
    trace = Trace()
    step = SelfDistillation.step
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def noted(self: SelfDistillation, views: Sequence[torch.Tensor], rates: Rates) -> StepResult:
        number = len(trace.began)
        trace.began.append(time.perf_counter())
        if self.device.type != "cuda":
            return step(self, views, rates)
        if number == first_profiled:
            profiler.start()
        if number == first_profiled + _PROFILED_STEPS:
            torch.cuda.synchronize()
            profiler.stop()
            trace.busy = _busy_share(profiler)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        result = step(self, views, rates)
        after.record()
        trace.marks.append((before, after))
        return result

    SelfDistillation.step = noted  # type: ignore[method-assign]
    try:
        yield trace
    finally:
        SelfDistillation.step = step  # type: ignore[method-assign]


def _busy_share(profiler: Any) -> float:
    """Of the time from the first kernel to the last, the part in which at least one ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and event.time_range.end > event.time_range.start
    )
    return covered(spans)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that lies in a span; they are sorted by their starts."""
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / (until - spans[0][0])


def write_jpegs(folder: Path, count: int) -> None:
    """So many files, of which many are names of the same: parts of photographs, turned, at quality 90."""
    folder.mkdir(parents=True)
    made = min(count, _DIFFERENT)
    with ProcessPoolExecutor(usable_cores()) as processes:
        for _ in processes.map(_write_jpeg, [folder] * made, range(made), chunksize=16):
            pass
    for number in range(made, count):
        os.link(_path(folder, number % made), _path(folder, number))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.jpg"


def _write_jpeg(folder: Path, number: int) -> None:
    from sklearn.datasets import load_sample_images

    photograph = Image.fromarray(load_sample_images().images[number % 2])
    random = np.random.default_rng(number)
    share = random.uniform(0.5, 1)
    width, height = (int(share * side) for side in photograph.size)
    left, top = (
        int(random.integers(0, whole - part + 1))
        for whole, part in zip(photograph.size, (width, height), strict=True)
    )
    part = photograph.crop((left, top, left + width, top + height)).resize(_SIZE)
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    part.save(_path(folder, number), quality=90)
