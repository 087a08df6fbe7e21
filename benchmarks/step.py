"""How long does a training step take? Ours against the textbook's on timm's XCiT, with the same weights and views.

python benchmarks/step.py
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baseline import TextbookStep, textbook_names
from benchmarks.comparison import Comparison, ComparisonOptions, check, in_turns, report
from dino.distillation import Rates, SelfDistillation
from dino.plan import create_distillation
from dino.runtime.options import UserError, command, option
from dino.train_options import TrainOptions

_GLOBAL_VIEWS = 2
_RATES = Rates(lr=5e-4, weight_decay=0.04, momentum=0.996, teacher_temperature=0.04, hold_last_layer=False)
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepOptions(ComparisonOptions):
    turns: int = option(3, "Measurements of each way, one after the other in turns.")
    arch: str = option("xcit_small_12_p16", "An XCiT name.")
    batch: int = option(4, "Pictures.")
    out_dim: int = option(65536, "Prototypes.")
    drop_path_rate: float = option(0.1, "Of both.")


def comparisons(options: StepOptions) -> Iterator[Comparison]:
    """Float32; bf16 against the textbook in float32, and against the textbook under autocast."""
    if min(options.batch, options.out_dim) < 1:
        raise UserError("--batch and --out_dim must be 1 or more")
    yield from (
        _compare(options, ours, theirs, target)
        for ours, theirs, target in (("fp32", "fp32", 1.5), ("bf16", "fp32", 2.5), ("bf16", "bf16", 1.3))
    )


def _compare(options: StepOptions, our_precision: str, their_precision: str, target: float) -> Comparison:
    textbook = TextbookStep(
        options.arch,
        options.out_dim,
        options.drop_path_rate,
        options.device,
        autocast=_DTYPES[their_precision],
    )
    ours = create_distillation(
        TrainOptions(arch=options.arch, out_dim=options.out_dim, drop_path_rate=options.drop_path_rate),
        torch.device(options.device),
        our_precision,
    )
    textbook.copy_weights(ours.student.state_dict(), ours.teacher.state_dict())
    views = make_views(options.batch)
    note = ""
    if our_precision == their_precision == "fp32":
        note = f"relative error of the gradients {gradient_error(textbook, ours, views):.1e}"
        print(note)
    times = in_turns(
        lambda: textbook.step(views),
        lambda: ours.step(views, _RATES),
        turns=options.turns,
        device=options.device,
    )
    return Comparison(
        f"train step, {options.arch}, batch {options.batch}, {our_precision} against {their_precision}",
        "ms",
        *times,
        peer="timm's XCiT and a textbook DINO step",
        precision=f"{their_precision}, ours {our_precision}",
        target=target,
        note=note,
    )


def make_views(batch: int, local_number: int = 8) -> list[Tensor]:
    """Noise in the sizes of the paper's views."""
    generator = torch.Generator().manual_seed(0)
    sizes = [224] * _GLOBAL_VIEWS + [96] * local_number
    return [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]


def gradient_error(textbook: TextbookStep, ours: SelfDistillation, views: Sequence[Tensor]) -> float:
    """Length of the difference of all gradients of a step, relative to their length.

    The seed is the same for both, and so are the images that drop path leaves out. Gradients are not clipped: timm
    has class attention's queries, keys and values as three parameters.
    """
    clip_grad, textbook.clip_grad, ours.clip_grad = ours.clip_grad, 0.0, 0.0
    torch.manual_seed(0)
    textbook.step(views)
    torch.manual_seed(0)
    ours.step(views, _RATES)
    textbook.clip_grad = ours.clip_grad = clip_grad
    our_gradients = textbook_names(
        {name: p.grad for name, p in ours.student.named_parameters() if p.grad is not None}
    )
    pairs = [
        (our_gradients[name], parameter.grad)
        for name, parameter in textbook.student.named_parameters()
        if parameter.grad is not None
    ]
    difference = sum(float((one - other).square().sum()) for one, other in pairs)
    length = sum(float(other.square().sum()) for _, other in pairs)
    return (difference / length) ** 0.5


def measure(options: StepOptions) -> None:
    check(options)
    report(comparisons(options), options)


if __name__ == "__main__":
    command(StepOptions, measure, prog="benchmarks/step.py", description=__doc__ or "")
