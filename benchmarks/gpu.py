"""Ours against peers on a GPU: train steps, a pre-training on JPEGs, attention videos, k-NN, forward passes.

python benchmarks/gpu.py --output benchmarks/results/gpu.json

Each part runs in a process of its own and ends when its time is over, with what it has measured until then. Where
there is no peer the goal stands in its place. `--device cpu` with small sizes shows that all of it works.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.comparison import Comparison, ComparisonOptions, check, report
from dino.runtime.options import UserError, command, option

# Dense bf16 arithmetic per second of the chips whose data sheets were read.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_GOAL_FRAMES = 25.0


@dataclass(frozen=True)
class GpuOptions(ComparisonOptions):
    device: str = option("cuda", "Where to compute: cuda, or cpu to try it with small sizes.")
    turns: int = option(3, "Measurements of each way, one after the other in turns.")
    parts: tuple[str, ...] = option(
        ("steps_16", "pretraining", "video", "knn", "steps_8", "forward"), "What to measure, in this order."
    )
    minutes: float = option(8.0, "For all parts together; each has its share.")
    arch_16: str = option("xcit_small_12_p16", "Backbone of steps_16 and pretraining.")
    arch_8: str = option("xcit_small_12_p8", "Backbone of steps_8 and video.")
    out_dim: int = option(65536, "Prototypes.")
    sizes: tuple[int, int] = option((224, 96), "Sides of global and local views in pixels.")
    local_crops_number: int = option(8, "Local views.")
    batches: tuple[int, ...] = option(
        (32, 64, 128), "Pictures of a step, rising; on CUDA then as many as fit."
    )
    modes: tuple[str, ...] = option(
        ("default",), "Of the compiler, to try: default, reduce-overhead (CUDA graphs)."
    )
    compile: str = option("auto", "In the pre-training: auto, true or false.")
    data_path: str = option("", "Folder of JPEGs for the pre-training; empty = made up ones of 500 x 375.")
    batch_size: int = option(256, "Pictures of a step in the pre-training.")
    steps: int = option(120, "Of the pre-training.")
    settled: int = option(30, "Of them, first ones that do not count.")
    num_workers: int = option(16, "Loading processes, at most the usable cores.")
    video_size: tuple[int, int] = option((720, 1280), "Rows and columns of the film.")
    video_seconds: int = option(8, "Its length, at 25 frames a second.")
    knn_sizes: tuple[int, int] = option((1_281_167, 50_000), "Training features and queries.")


def measure(options: GpuOptions) -> None:
    """Raises: UserError: no such device or part."""
    from dino.runtime.distributed import pick_device

    check(options)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UserError(f"unknown part {unknown[0]} in --parts; known: {', '.join(PARTS)}")
    pick_device(options.device)
    report(comparisons(options), options)


def comparisons(options: GpuOptions) -> Iterator[Comparison]:
    """Of all parts, in their order; what a part could not measure in its time is said and left out."""
    shares = sum(PARTS[name][1] for name in options.parts)
    for name in options.parts:
        part, share = PARTS[name]
        yield from in_time(name, part, options, 60 * options.minutes * share / shares)


def in_time(
    name: str, part: Callable[[GpuOptions], Iterator[Comparison]], options: GpuOptions, seconds: float
) -> Iterator[Comparison]:
    """What a part yields in a process of its own, until it ends or its time is over."""
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(part, options, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, began + seconds - time.monotonic())):
            try:
                yield receiver.recv()
            except EOFError:
                process.join()
                break
        else:
            print(f"{name}: its {seconds:.0f} s are over", flush=True)
    finally:
        if process.is_alive():
            _end(process)
    if process.exitcode and process.exitcode != -signal.SIGKILL:
        print(f"{name}: failed, see above", flush=True)
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """With the processes that it has started."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not come so far as to lead a group
        process.kill()
    process.join()


def _send_all(
    part: Callable[[GpuOptions], Iterator[Comparison]], options: GpuOptions, sender: Connection
) -> None:
    os.setpgid(0, 0)
    try:
        for comparison in part(options):
            sender.send(comparison)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _steps_16(options: GpuOptions) -> Iterator[Comparison]:
    yield from _steps(options.arch_16, options)


def _steps_8(options: GpuOptions) -> Iterator[Comparison]:
    yield from _steps(options.arch_8, options)


def _steps(arch: str, options: GpuOptions) -> Iterator[Comparison]:
    from benchmarks.gpu_steps import Ways, step_comparisons
    from dino.runtime.distributed import describe, pick_device

    device = pick_device(options.device)
    named = [flops for chip, flops in _PEAK_FLOPS.items() if chip in describe(device)]
    large, small = options.sizes
    ways = Ways(arch, options.out_dim, [large] * 2 + [small] * options.local_crops_number, device)
    yield from step_comparisons(
        ways,
        options.batches,
        turns=options.turns,
        modes=options.modes,
        peak_flops=named[0] if named else None,
    )


def _pretraining(options: GpuOptions) -> Iterator[Comparison]:
    from benchmarks.gpu_pretraining import pretraining_comparisons
    from dino.runtime.distributed import usable_cores
    from dino.train_options import TrainOptions

    large, small = options.sizes
    training = TrainOptions(
        arch=options.arch_16,
        out_dim=options.out_dim,
        global_crops_size=large,
        local_crops_size=small,
        local_crops_number=options.local_crops_number,
        batch_size_per_gpu=options.batch_size,
        num_workers=min(options.num_workers, usable_cores()),
        device=options.device,
        compile=options.compile,
    )
    yield from pretraining_comparisons(training, options.data_path, options.steps, options.settled)


def _video(options: GpuOptions) -> Iterator[Comparison]:
    from benchmarks.attention_video import FilmingOptions, _make_clip, _speed

    with tempfile.TemporaryDirectory() as name:
        clip = Path(name) / "clip.mp4"
        _make_clip(clip, options.video_size, options.video_seconds)
        filming = FilmingOptions(
            video=str(clip), arch=options.arch_8, layouts=("overlay",), device=options.device
        )
        measured = _speed(Path(name), filming)["overlay"]
    stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in measured["ms_per_frame"].items())
    yield Comparison(
        f"attention video, {options.arch_8}, {options.video_size[0]} rows, per frame",
        "ms",
        [1e3 / _GOAL_FRAMES],
        [1e3 / measured["frames_per_second"]],
        peer=f"goal: {_GOAL_FRAMES:g} frames/s",
        precision="auto",
        target=1.0,
        note=f"ms per frame: {stages}",
    )


def _knn(options: GpuOptions) -> Iterator[Comparison]:
    from benchmarks.gpu_knn import knn_comparison

    yield knn_comparison(*options.knn_sizes, device=options.device)


def _forward(options: GpuOptions) -> Iterator[Comparison]:
    from benchmarks.forward import ForwardOptions
    from benchmarks.forward import comparisons as forward_comparisons

    yield from forward_comparisons(
        ForwardOptions(device=options.device, turns=options.turns, arch=options.arch_16)
    )


# What each part measures, and its share of the time.
PARTS: dict[str, tuple[Callable[[GpuOptions], Iterator[Comparison]], float]] = {
    "steps_16": (_steps_16, 2.0),
    "pretraining": (_pretraining, 2.0),
    "video": (_video, 0.7),
    "knn": (_knn, 0.9),
    "steps_8": (_steps_8, 1.7),
    "forward": (_forward, 0.7),
}


if __name__ == "__main__":
    command(GpuOptions, measure, prog="benchmarks/gpu.py", description=__doc__ or "")
