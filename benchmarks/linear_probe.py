"""How long does a grid of linear heads take on cached features? All in one pass, against one head after the other.

python benchmarks/linear_probe.py --output benchmarks/results/linear_probe.json

Theirs is what anyone would write: for every learning rate a `torch.nn.Linear`, `torch.optim.SGD` and a cosine schedule
on batches of the same features, which lie standardised in memory. Both ways compute in the same precision, and with
numbers below the normal ones of float32 flushed to zero: a head that has learned all pictures has such gradients, on
which some processors take a hundred times as long.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.comparison import Comparison, ComparisonOptions, check, in_turns, report
from dino.evaluation.linear_heads import Recipe, Standardise, train_heads
from dino.runtime.distributed import autocast
from dino.runtime.options import UserError, command, option

_MOMENTUM = 0.9
_TARGET = 2.0
# With more, nearly all time goes into products, and both ways compute the same ones.
_MOST_CLASSES_FOR_TARGET = 100


@dataclass(frozen=True)
class ProbeOptions(ComparisonOptions):
    turns: int = option(3, "Measurements of each way, one after the other in turns.")
    pictures: int = option(50_000, "Cached features, in float16 as they are stored.")
    width: int = option(768, "Channels of a feature.")
    classes: tuple[int, ...] = option((100, 1000), "Numbers of classes, each measured.")
    rates: int = option(12, "Learning rates of the grid.")
    batch_size: int = option(256, "Pictures per step.")
    steps: int = option(30, "Steps that are timed; an epoch is --pictures / --batch_size.")
    precisions: tuple[str, ...] = option(("fp32", "bf16"), "Of the products with the weights, each measured.")


def measure(options: ProbeOptions) -> None:
    check(options)
    sizes = (options.pictures, options.width, options.rates, options.batch_size, options.steps)
    if min(*sizes, *options.classes) < 1 or options.pictures < options.steps * options.batch_size:
        raise UserError("all sizes are 1 or more, and --pictures are enough for --steps of --batch_size")
    report(comparisons(options), options)


def comparisons(options: ProbeOptions) -> Iterator[Comparison]:
    torch.set_flush_denormal(True)
    try:
        for classes in options.classes:
            features, labels = clouds(options.pictures, options.width, classes)
            for precision in options.precisions:
                yield _compared(features, labels, classes, precision, options)
    finally:
        torch.set_flush_denormal(False)


def _compared(
    features: np.ndarray, labels: np.ndarray, classes: int, precision: str, options: ProbeOptions
) -> Comparison:
    device = torch.device(options.device)
    rates = tuple(float(rate) for rate in np.logspace(-4, 0, options.rates))
    rows = np.random.default_rng(0).permutation(len(labels))[: options.steps * options.batch_size]
    standardise = Standardise(features, device)
    recipe = Recipe(classes, 1, options.batch_size, device, precision, seed=0)
    x, y = standardise(features[rows]), torch.from_numpy(labels[rows]).to(device)
    theirs, ours = in_turns(
        lambda: one_by_one(x, y, rates, recipe),
        lambda: train_heads(
            {"x": features},
            labels,
            rows,
            standardise={"x": standardise},
            rates={"x": rates},
            recipe=recipe,
            advance=lambda: None,
        ),
        turns=options.turns,
        device=options.device,
    )
    return Comparison(
        f"linear probe, {len(rates)} rates, {options.width} x {classes}, {precision}",
        "ms",
        theirs,
        ours,
        peer="torch.nn.Linear and SGD, one head after the other",
        precision=precision,
        target=_TARGET if classes <= _MOST_CLASSES_FOR_TARGET else None,
        note=f"{options.steps} steps of {options.batch_size}, flush_denormal on",
    )


def clouds(pictures: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, C) float16 in clouds about the centres of their classes, and labels (n,)."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, pictures)
    centres = generator.standard_normal((classes, width), np.float32)
    features = generator.standard_normal((pictures, width), np.float32)
    features += centres[labels]
    return features.astype(np.float16), labels


def one_by_one(x: Tensor, y: Tensor, rates: tuple[float, ...], recipe: Recipe) -> list[nn.Linear]:
    """A head for every rate, each trained on all of x (n, C) and y (n,), `recipe.epochs` times."""
    return [_one(x, y, rate, recipe) for rate in rates]


def _one(x: Tensor, y: Tensor, rate: float, recipe: Recipe) -> nn.Linear:
    head = nn.Linear(x.shape[1], recipe.num_classes, device=x.device)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate * recipe.batch_size / 256, momentum=_MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.steps(len(x)))
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(x), device=x.device).split(recipe.batch_size):
            with autocast(x.device, recipe.precision):
                logits = head(x[batch])
            loss = F.cross_entropy(logits.float(), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head


if __name__ == "__main__":
    command(ProbeOptions, measure, prog="benchmarks/linear_probe.py", description=__doc__ or "")
