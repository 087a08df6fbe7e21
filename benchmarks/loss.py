"""The loss and its gradient: how much memory beyond its inputs, how fast?

python benchmarks/loss.py --output benchmarks/results/loss.json

From the logits of student and teacher to the gradient of the student's, with centering and sharpening and the move of
the center; against a textbook's double loop over views, and lightly's DINOLoss where that is installed. Memory is that
of fresh processes, of which each does one of them once.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baseline import TextbookLoss
from benchmarks.comparison import (
    Comparison,
    ComparisonOptions,
    check,
    in_turns,
    isolated,
    peak_megabytes,
    report,
)
from dino.loss import dino_loss
from dino.runtime.options import UserError, command, option
from dino.teacher import Center

_TEACHER_VIEWS = 2
_STUDENT_TEMPERATURE = 0.1
_TEACHER_TEMPERATURE = 0.04


@dataclass(frozen=True)
class LossOptions(ComparisonOptions):
    images: int = option(64, "Images of a batch.")
    views: int = option(10, "Views of an image, at least 2.")
    prototypes: int = option(65536, "Width of the output.")


def measure(options: LossOptions) -> None:
    check(options)
    if options.views < 2 or min(options.images, options.prototypes) < 1:
        raise UserError(
            "--views must be 2 or more, --images and --prototypes 1 or more, "
            f"got {options.views}, {options.images} and {options.prototypes}"
        )
    report(comparisons(options), options)


def comparisons(options: LossOptions) -> Iterator[Comparison]:
    """Memory, then time, against the textbook; and against lightly, where it is installed."""
    shape = (options.views, options.images, options.prototypes)
    size = f"{options.images} x {options.views} x {options.prototypes}"
    peaks = {way: [isolated(_peak_of, way, shape, options.device) for _ in range(3)] for way in _ways()}
    for way, peer in _ways().items():
        if way == "ours":
            continue
        yield Comparison(
            f"loss and gradient, peak beyond inputs, {size}, {way}",
            "MB",
            theirs=peaks[way],
            ours=peaks["ours"],
            peer=way,
            target=4.0 if way == "textbook" else None,
            note=f"{options.device}; of that the gradient: {shape[0] * shape[1] * shape[2] * 4 / 1e6:.0f} MB",
        )
        times = in_turns(
            peer(shape, options.device),
            our_way(shape, options.device),
            turns=options.turns,
            device=options.device,
        )
        yield Comparison(
            f"loss and gradient, time, {size}, {way}", "ms", *times, peer=way, note=options.device
        )


def _logits(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    """Cosines, as of a head whose prototypes have length 1: (V, B, K) of the student, (T, B, K) of the teacher."""
    generator = torch.Generator(device).manual_seed(0)
    student = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)
    teacher = torch.empty((_TEACHER_VIEWS, *shape[1:]), device=device).uniform_(-1, 1, generator=generator)
    return student.requires_grad_(), teacher


def textbook_way(shape: tuple[int, int, int], device: str) -> Callable[[], Tensor]:
    student, teacher = _logits(shape, device)
    loss = TextbookLoss(shape[-1], _STUDENT_TEMPERATURE, _TEACHER_TEMPERATURE).to(device)

    def run() -> Tensor:
        student.grad = None
        loss(student.flatten(0, 1), teacher.flatten(0, 1), len(student)).backward()
        return student.grad

    return run


def our_way(shape: tuple[int, int, int], device: str) -> Callable[[], Tensor]:
    student, teacher = _logits(shape, device)
    center = Center(shape[-1]).to(device)

    def run() -> Tensor:
        student.grad = None
        targets = center.targets(teacher, _TEACHER_TEMPERATURE)
        dino_loss(student, targets, _STUDENT_TEMPERATURE).backward()
        center.update(teacher)
        return student.grad

    return run


def lightly_way(shape: tuple[int, int, int], device: str) -> Callable[[], Tensor]:
    from lightly.loss import DINOLoss

    student, teacher = _logits(shape, device)
    loss = DINOLoss(shape[-1], student_temp=_STUDENT_TEMPERATURE).to(device)

    def run() -> Tensor:
        student.grad = None
        loss(list(teacher), list(student), teacher_temp=_TEACHER_TEMPERATURE).backward()
        return student.grad

    return run


def _ways() -> dict[str, Callable[[tuple[int, int, int], str], Callable[[], Tensor]]]:
    lightly = {"lightly": lightly_way} if importlib.util.find_spec("lightly") else {}
    return {"textbook": textbook_way, "ours": our_way, **lightly}


def _peak_of(way: str, shape: tuple[int, int, int], device: str) -> float:
    """Megabytes beyond the inputs, in the process that this is called in."""
    # What torch loads at its first backward pass is not the loss's.
    _ways()[way]((2, 1, 65536), device)()
    run = _ways()[way](shape, device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    before = peak_megabytes()
    run()
    return peak_megabytes() - before


if __name__ == "__main__":
    command(LossOptions, measure, prog="benchmarks/loss.py", description=__doc__ or "")
