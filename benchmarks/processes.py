"""How fast does a run train with one process and with two, and how long does it wait for pictures and for the others?

python benchmarks/processes.py --output benchmarks/results/processes.json

The same training, of as many pictures in a step, by every number of processes in turn, several times; processes on
CPUs share the cores. Every other step goes without the reduction of gradients: what the others take longer is what
that costs. The sums of batch norm, center and measures, which are small, are part of both.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dino.evaluation.results import provenance
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option
from dino.train_options import TrainOptions, preset_defaults

_REPORT = "timing.json"
_FOLDER = "DINO_TIMING_FOLDER"  # tells a process that it is one of those that are timed
_WARM_UP = 4  # steps in which memory is taken and threads are started


@dataclass(frozen=True)
class ProcessesOptions:
    processes: tuple[int, ...] = option((1, 2), "Numbers of processes to compare.")
    data_path: str = option("demo", "Pictures.")
    preset: str = option("tiny", "Of the training.")
    batch_size: int = option(64, "Pictures per step, over all processes.")
    steps: int = option(24, "Steps that are timed in a turn.")
    rounds: int = option(3, "Turns of every number of processes.")
    device: str = option("auto", "auto, cpu or cuda.")
    precision: str = option("auto", "Of the forward pass.", choices=("auto", "fp32", "bf16", "fp16"))
    num_workers: int = option(10, "Loading processes per process, at most the cores that it has.")
    output: str = option("", "Write the numbers to this JSON file too; empty = no file.")


def measure(options: ProcessesOptions) -> None:
    if os.environ.get(_FOLDER):
        _be_timed(options)
        return
    if min(options.processes, default=0) < 1 or options.steps < 2 or options.rounds < 1:
        raise UserError("--processes and --rounds are 1 or more, --steps 2 or more")
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    turns: dict[int, list[dict[str, Any]]] = {count: [] for count in options.processes}
    for _ in range(options.rounds):
        for count in options.processes:
            turns[count].append(_turn(count))
    rows = [_row(options, count, of_count) for count, of_count in turns.items()]
    print("processes  pictures/s (least to most)  waiting for pictures  reducing gradients")
    for row in rows:
        least, most = row["pictures_per_second_range"]
        rate = f"{row['pictures_per_second']:.1f} ({least:.1f} to {most:.1f})"
        print(f"{row['processes']:9}  {rate:26}  {row['waiting_share']:20.1%}  {row['reducing_share']:18.1%}")
    if options.output:
        report = {"rows": rows, **provenance()}
        write_atomically(
            Path(options.output), lambda file: file.write_text(json.dumps(report, indent=1) + "\n")
        )


def _turn(count: int) -> dict[str, Any]:
    """A training by so many processes, and what the first of them measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        shared |= {"LOCAL_WORLD_SIZE": str(count), _FOLDER: folder}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:]],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise UserError(f"a training by {count} processes failed: see above")
        return dict(json.loads((Path(folder) / _REPORT).read_text()))


def _row(options: ProcessesOptions, count: int, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps of a turn, then over the turns."""
    reduced, alone, waited = (
        [statistics.median(turn[name]) for turn in turns] for name in ("reduced", "alone", "waited")
    )
    whole = [step + wait for step, wait in zip(reduced, waited, strict=True)]
    rates = sorted(options.batch_size / seconds for seconds in whole)
    saved = statistics.median(step - without for step, without in zip(reduced, alone, strict=True))
    return {
        "processes": count,
        "pictures_per_second": statistics.median(rates),
        "pictures_per_second_range": [rates[0], rates[-1]],
        "seconds_per_step": statistics.median(whole),
        "waiting_share": statistics.median(waited) / statistics.median(whole),
        "reducing_share": max(saved, 0.0) / statistics.median(whole) if count > 1 else 0.0,
    }


def _be_timed(options: ProcessesOptions) -> None:
    """One of the processes of a turn: train, and time every step."""
    from torch.nn.parallel import DistributedDataParallel

    from dino.batched_distortions import OnDevice
    from dino.plan import create_distillation, create_plan
    from dino.runtime import distributed

    device = distributed.pick_device(options.device)
    with distributed.processes(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # see `pretrain`
        training = _training(options, distributed.world_size())
        distillation = create_distillation(
            training, device, distributed.pick_precision(options.precision, device)
        )
        feed, order = _feed(training, device)
        rates = create_plan(training, order.count, options.batch_size).rates(0)
        times: dict[str, list[float]] = {"reduced": [], "alone": [], "waited": []}
        waited, prepare = 0.0, OnDevice(device)
        for step, batch in enumerate(feed.batches(order)):
            kind = ("reduced", "alone")[step % 2]
            student = distillation._parallel_student
            without = isinstance(student, DistributedDataParallel) and kind == "alone"
            began = time.monotonic()
            with student.no_sync() if without else nullcontext():
                distillation.step(
                    prepare(batch), rates
                )  # ends with numbers that are read, and so synchronised
            if step >= _WARM_UP:
                times[kind].append(time.monotonic() - began)
                times["waited"].append(feed.waited - waited)
            waited = feed.waited
            if step == _WARM_UP + options.steps - 1:
                break
        if distributed.is_main():
            (Path(os.environ[_FOLDER]) / _REPORT).write_text(json.dumps(times))


def _training(options: ProcessesOptions, processes: int) -> TrainOptions:
    preset = preset_defaults([f"--preset={options.preset}"])
    if options.batch_size % processes:
        raise UserError(f"--batch_size {options.batch_size} cannot be shared by {processes} processes")
    return replace(
        preset,
        data_path=options.data_path,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        freeze_last_layer=0,
        epochs=1000,
    )


def _feed(training: TrainOptions, device: Any) -> tuple[Any, Any]:
    from functools import partial

    from dino.feed import Feed
    from dino.loader import EpochOrder, create_loader, joined
    from dino.plan import create_views
    from dino.runtime import distributed
    from dino.runtime.interruption import Interruption
    from dino.runtime.pictures import open_pictures

    pictures = open_pictures(training.data_path)
    workers = distributed.share_cores(device, training.num_workers)
    open_loader = partial(
        create_loader,
        pictures,
        create_views(training, device),
        enough=4 * training.global_crops_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    feed = Feed(open_loader, Interruption(), join=joined, max_broken=0, num_workers=workers, say=print)
    order = EpochOrder(
        len(pictures),
        global_batch=training.batch_size,
        epochs=training.epochs,
        seed=0,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return feed, order


if __name__ == "__main__":
    command(
        ProcessesOptions,
        measure,
        prog="benchmarks/processes.py",
        description="Pictures per second with one process and with several, and what they wait for.",
    )
