"""What a run says of itself in a few lines: at the start what it understood, at the end what came out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dino.attention.run_page import NAME as RUN_PAGE
from dino.memory import step_memory
from dino.monitor import NEIGHBOURS
from dino.network import MultiCropNetwork
from dino.plan import Plan, share_of_step
from dino.runtime import distributed
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures
from dino.train_options import TrainOptions, preset_lines


def opening_lines(
    options: TrainOptions,
    pictures: Pictures,
    plan: Plan,
    student: MultiCropNetwork,
    device: torch.device,
    precision: str,
) -> list[str]:
    """Preset, pictures, backbone, views, steps, rates, device and memory, where it all goes.

    Raises:
        UserError: the backbone cannot take views of these sizes.
    """
    world_size = distributed.world_size()
    batch, at_once = share_of_step(options)
    factors = [f"{world_size} processes"] if world_size > 1 else []
    factors += [f"{options.accumulate} parts"] if options.accumulate > 1 else []
    shares = f" ({' x '.join([*factors, str(at_once)])})" if factors else ""
    classes = f"in {len(pictures.classes)} classes" if pictures.labels is not None else "no labels"
    parameters = sum(parameter.numel() for parameter in student.backbone.parameters())
    local = f", {options.local_crops_number} x {options.local_crops_size} px"
    purpose, *settings = preset_lines(options)
    preset = [f"preset:    {purpose}", *(f"           {line}" for line in settings)]
    return [
        *(preset if options.preset != "paper" else []),
        f"pictures:  {len(pictures):,}, {classes}, from {options.data_path}",
        f"backbone:  {options.arch}, {parameters / 1e6:.1f} M parameters; {options.out_dim:,} prototypes",
        f"views:     2 x {options.global_crops_size} px{local if options.local_crops_number else ''}",
        f"steps:     {options.epochs:,} epochs x {plan.steps_per_epoch:,} steps = {plan.steps:,} steps, "
        f"of {batch:,} pictures{shares}",
        f"rates:     learning rate {options.lr:g} x {batch} / 256 = {plan.lr.max():.3g} at its peak",
        f"computing: {device}, {precision}, {_memory(options, at_once, student, precision)}",
        f"output:    {Path(options.output_dir).resolve()}",
    ]


def closing_lines(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """k-NN before and after, and the files to look at."""
    lines = []
    measured = [row for row in rows if row.get("knn") is not None]
    if measured:
        starts = {"knn_random": "for the random network", "knn_init": "for the weights it started from"}
        before = [
            f"{measured[-1][key]:.1f} % {words}, " for key, words in starts.items() if key in measured[-1]
        ]
        compared = "".join(before)
        lines.append(f"{NEIGHBOURS}-NN accuracy: {compared}{measured[-1]['knn']:.1f} % after the training")
    files = ("checkpoint.pth", "best_knn.pth", "log.txt", "curves.png", "attention")
    there = [name for name in files if (folder / name).exists()]
    lines.append(f"{', '.join(there)}: in {folder.resolve()}")
    if (folder / RUN_PAGE).exists():
        lines.append(f"open {folder / RUN_PAGE}: curves, k-NN, and attention as it emerged")
    return lines


def _memory(options: TrainOptions, at_once: int, student: MultiCropNetwork, precision: str) -> str:
    sizes = [options.global_crops_size] * 2 + [options.local_crops_size] * options.local_crops_number
    try:
        needed = step_memory(student, sizes, at_once, low_precision=precision != "fp32")
    except NotImplementedError:  # an operation that torch cannot follow without values
        return "memory unknown"
    except (RuntimeError, ValueError, AssertionError) as error:
        problem = str(error).partition("\n")[0]
        raise UserError(
            f"--arch {options.arch} cannot be trained on {at_once} pictures at once with "
            f"--global_crops_size {options.global_crops_size} and --local_crops_size {options.local_crops_size}: "
            f"{problem}"
        ) from error
    return f"about {needed / 2**30:.2g} GiB of memory for a step of a process"
