"""What follows the gradients: clipping, the optimizer, the teacher's average. Ours against one parameter at a time.

python benchmarks/update.py --output benchmarks/results/update.json

The gradients are those of a real backward pass before each measurement, which is not counted: what memory it leaves
behind is part of what the update costs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.baseline import TextbookLoss, TextbookNetwork, update_teacher
from benchmarks.baseline import clip_gradients as clip_one_by_one
from benchmarks.baseline import create_optimizer as create_default_adamw
from benchmarks.comparison import Comparison, ComparisonOptions, check, milliseconds, report
from dino.head import DinoHead
from dino.network import MultiCropNetwork
from dino.optimizer import (
    clip_gradients,
    create_optimizer,
    gradient_norms,
    parameter_groups,
    set_rates,
)
from dino.runtime.backbones import create_backbone
from dino.runtime.options import UserError, command, option
from dino.teacher import follow

_LR, _WEIGHT_DECAY, _MOMENTUM = 5e-4, 0.04, 0.996
_PEERS = {
    "clipping": "a loop over parameters",
    "optimizer": "torch's default AdamW",
    "teacher": "a loop over parameters",
}

# Names of parts, in their order, to what they do.
Parts = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class UpdateOptions(ComparisonOptions):
    arch: str = option("xcit_small_12_p16", "XCiT, by its name without a size.")
    prototypes: int = option(65536, "Width of the output.")
    side: int = option(96, "Side in pixels of the two pictures that the gradients are of.")
    clip_grad: float = option(3.0, "Longest gradient of a parameter.")


def measure(options: UpdateOptions) -> None:
    check(options)
    if min(options.prototypes, options.side) < 1 or options.clip_grad <= 0:
        raise UserError(
            "--prototypes and --side must be 1 or more and --clip_grad above 0, "
            f"got {options.prototypes}, {options.side} and {options.clip_grad:g}"
        )
    report(comparisons(options), options)


def comparisons(options: UpdateOptions) -> Iterator[Comparison]:
    ways = [way(options) for way in (_one_by_one, _all_at_once)]
    times: list[dict[str, list[float]]] = [{part: [] for part in _PEERS} for _ in ways]
    for turn in range(options.turns + 1):
        for (network, parts), of_parts in zip(ways, times, strict=True):
            _compute_gradients(network, options)
            for name, part in parts.items():
                spent = milliseconds(part, options.device)
                if turn:  # the first makes the optimizer's state
                    of_parts[name].append(spent)
    theirs, ours = times
    for part, peer in _PEERS.items():
        yield Comparison(f"update: {part}", "ms", theirs[part], ours[part], peer=peer, note=options.device)
    yield Comparison(
        f"update together, {options.arch}, out_dim {options.prototypes}",
        "ms",
        theirs=[sum(turn) for turn in zip(*theirs.values(), strict=True)],
        ours=[sum(turn) for turn in zip(*ours.values(), strict=True)],
        peer="one parameter at a time, torch's default AdamW",
        target=8.0,
        note=options.device,
    )


def _compute_gradients(network: nn.Module, options: UpdateOptions) -> None:
    network.zero_grad(set_to_none=True)
    views = [torch.randn(1, 3, options.side, options.side, device=options.device) for _ in range(2)]
    output = network(views)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits_VBK
    logits = logits.reshape(len(views), options.prototypes)
    loss = TextbookLoss(options.prototypes).to(options.device)
    loss(logits, logits.detach(), len(views)).backward()
    if options.device.startswith("cuda"):
        torch.cuda.synchronize(options.device)


def _one_by_one(options: UpdateOptions) -> tuple[nn.Module, Parts]:
    student, teacher = (
        TextbookNetwork(options.arch, options.prototypes).to(options.device) for _ in range(2)
    )
    optimizer = create_default_adamw(student, _LR, _WEIGHT_DECAY)
    return student, {
        "clipping": lambda: clip_one_by_one(student.parameters(), options.clip_grad),
        "optimizer": optimizer.step,
        "teacher": lambda: update_teacher(teacher.requires_grad_(False), student, _MOMENTUM),
    }


def _all_at_once(options: UpdateOptions) -> tuple[nn.Module, Parts]:
    student, teacher = (_our_network(options) for _ in range(2))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = create_optimizer("adamw", parameter_groups(student))
    set_rates(optimizer, _LR, _WEIGHT_DECAY)
    return student, {
        "clipping": lambda: clip_gradients(trained, gradient_norms(trained), options.clip_grad),
        "optimizer": optimizer.step,
        "teacher": lambda: follow(teacher, student, _MOMENTUM),
    }


def _our_network(options: UpdateOptions) -> MultiCropNetwork:
    backbone = create_backbone(options.arch)
    head = DinoHead(backbone.num_features, options.prototypes)
    return MultiCropNetwork(backbone, head).to(options.device)


if __name__ == "__main__":
    command(UpdateOptions, measure, prog="benchmarks/update.py", description=__doc__ or "")
