"""Ours against what a user would take instead, on a CPU: all of it, as one table.

python benchmarks/bench.py --output benchmarks/results/cpu.json

Each benchmark runs in a process of its own, one after the other; nothing else should run on the machine meanwhile.
Each of them is also a command of its own, with options: `python benchmarks/step.py --help`.
"""

import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_type_hints

from benchmarks.comparison import Comparison, ComparisonOptions, check, isolated, report
from dino.runtime.options import UserError, command, option

BENCHMARKS = (
    *("step", "update", "loss", "multicrop", "forward", "vit_attention", "rendering"),
    *("attention_video", "knn_search", "linear_probe", "start"),
)


@dataclass(frozen=True)
class BenchOptions(ComparisonOptions):
    turns: int = option(
        0, "Measurements of each way, one after the other in turns; 0 = as many as each sets itself."
    )
    only: tuple[str, ...] = option((), f"Some of: {', '.join(BENCHMARKS)}; none = all.")


def measure(options: BenchOptions) -> None:
    """Raises: UserError: no such benchmark."""
    unknown = [name for name in options.only if name not in BENCHMARKS]
    if unknown:
        raise UserError(f"unknown benchmark {unknown[0]} in --only; known: {', '.join(BENCHMARKS)}")
    check(ComparisonOptions(turns=options.turns or 1, output=options.output))
    began = time.monotonic()
    report(comparisons(options), options)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


def comparisons(options: BenchOptions) -> Iterator[Comparison]:
    settings: dict[str, Any] = {"turns": options.turns} if options.turns else {}
    for name in options.only or BENCHMARKS:
        print(f"{name}.py, some seconds to some minutes ...", flush=True)
        yield from isolated(comparisons_of, name, {"device": options.device, **settings})


def comparisons_of(name: str, settings: dict[str, Any]) -> list[Comparison]:
    module = importlib.import_module(f"benchmarks.{name}")
    kind = get_type_hints(module.comparisons)["options"]
    return list(module.comparisons(kind(**settings)))


if __name__ == "__main__":
    command(BenchOptions, measure, prog="benchmarks/bench.py", description=__doc__ or "")
