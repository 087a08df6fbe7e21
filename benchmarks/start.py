"""How long until a command answers, and until a package is there? Against what the originals import first.

python benchmarks/start.py --output benchmarks/results/start.json

Every start is a fresh process of Python, timed from outside and in turns with the others. The original's scripts import
torch, torchvision and timm before they read their arguments, so that is what `--help` and a run are compared with; a
library is compared with torch, which it cannot do without. The files lie in the system's memory.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.comparison import Comparison, ComparisonOptions, check, milliseconds, report
from dino.runtime.options import command, option

COMMANDS = (
    *("dino.train", "dino.slurm", "dino.attention.visualize", "dino.attention.score"),
    *(f"dino.evaluation.{name}" for name in ("features", "eval_knn", "eval_linear", "verify", "compare")),
    *(f"dino.downstream.{name}" for name in ("classify", "detect", "segment")),
)

_NOTHING = "pass"
_TORCH = "import torch"
_ORIGINAL = "import torch, torchvision, timm"

_HELP_MS = 1000  # a command's --help is there in less
_BESIDE_TORCH_MS = 300  # what importing xcit may take beside torch


@dataclass(frozen=True)
class StartOptions(ComparisonOptions):
    commands: tuple[str, ...] = option(COMMANDS, "Modules whose --help is timed.")
    turns: int = option(3, "Starts of each, one after the other in turns.")


def measure(options: StartOptions) -> None:
    check(options)
    report(comparisons(options), options)


def comparisons(options: StartOptions) -> Iterator[Comparison]:
    helps = {f"{name} --help": ("-m", name, "--help") for name in options.commands}
    imports = {
        code: ("-c", code)
        for code in (
            *(_NOTHING, _TORCH, _ORIGINAL),
            *("import xcit", "import dino.attention.render", "import dino.pretraining"),
        )
    }
    times = _in_turns({**imports, **helps}, options.turns)
    original, torch = times[_ORIGINAL], times[_TORCH]
    python = f"python alone {median(times[_NOTHING]):.0f} ms"
    for name in helps:
        target = round(median(original) / _HELP_MS, 2)
        yield Comparison(f"start, {name}", "ms", original, times[name], _ORIGINAL, "", target, python)
    target = round(median(torch) / (median(torch) + _BESIDE_TORCH_MS), 2)
    beside = [ours - theirs for ours, theirs in zip(times["import xcit"], torch, strict=True)]
    note = f"{median(beside):.0f} ms beside torch's own"
    yield Comparison("start, import xcit", "ms", torch, times["import xcit"], _TORCH, "", target, note)
    drawing = "import dino.attention.render"
    yield Comparison(f"start, {drawing}", "ms", torch, times[drawing], _TORCH, "", None, "imports no torch")
    run = "import dino.pretraining"
    yield Comparison(f"start, {run}", "ms", original, times[run], _ORIGINAL, "", None, python)


def _in_turns(starts: dict[str, tuple[str, ...]], turns: int) -> dict[str, list[float]]:
    """Milliseconds of every start in every turn, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in starts}
    for turn in range(turns + 1):
        for name, arguments in starts.items():
            taken = milliseconds(lambda arguments=arguments: _start(arguments))
            if turn:
                times[name].append(taken)
    return times


def _start(arguments: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    command(StartOptions, measure, prog="benchmarks/start.py", description=__doc__ or "")
