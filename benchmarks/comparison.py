"""Ours against what a user would take instead: both in one run, in turns, and how sure the ratio is."""

import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from dino.evaluation.results import provenance
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, option

Result = TypeVar("Result")

# A ratio below this is not believed until so many more turns have shown it too.
RESOLVED = 1.2
_MORE_TURNS = 2


@dataclass(frozen=True)
class ComparisonOptions:
    """What all benchmarks take."""

    turns: int = option(5, "Measurements of each way, one after the other in turns.")
    device: str = option("cpu", "Where to compute: cpu or cuda.")
    output: str = option("", "Write the numbers to this JSON file too; empty = no file.")


@dataclass(frozen=True)
class Comparison:
    """One path, two ways.

    Attributes:
        path: what is compared, unique in the report.
        unit: of the measurements, of which less is better: `ms`, `s` or `MB`.
        theirs, ours: measurements; those of the same place were taken one after the other.
        peer: what theirs is.
        precision: of both ways, or of each.
        target: ratio that is aimed at; None = none is.
        note: what else there is to know, in a few words.
    """

    path: str
    unit: str
    theirs: list[float]
    ours: list[float]
    peer: str
    precision: str = "fp32"
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How often ours fits into theirs: of the medians."""
        return median(self.theirs) / median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest ratio of a single turn."""
        ratios = [theirs / ours for theirs, ours in zip(self.theirs, self.ours, strict=True)]
        return min(ratios), max(ratios)

    def line(self) -> str:
        low, high = self.spread
        aim = (
            ""
            if self.target is None
            else f"  target {self.target:g}{'' if self.ratio >= self.target else ': missed'}"
        )
        return (
            f"{self.path:58} {median(self.theirs):10.1f} {median(self.ours):10.1f} {self.unit:3} "
            f"x {self.ratio:5.2f} ({low:.2f} to {high:.2f})  {self.precision}{aim}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "spread": self.spread}


def in_turns(
    theirs: Callable[[], object], ours: Callable[[], object], *, turns: int, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Milliseconds of both, one after the other, after one call of each that does not count.

    Where the ratio comes out below `RESOLVED`, it is measured again as often.
    """
    times: list[tuple[float, float]] = []
    milliseconds(theirs, device), milliseconds(ours, device)
    for more in range(_MORE_TURNS):
        times += [(milliseconds(theirs, device), milliseconds(ours, device)) for _ in range(turns)]
        ratio = median(pair[0] for pair in times) / median(pair[1] for pair in times)
        if not more and ratio >= RESOLVED:
            break
    return [pair[0] for pair in times], [pair[1] for pair in times]


def milliseconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Of one call, on the clock; on a GPU until all of its work is done."""
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def peak_megabytes() -> float:
    """The most memory that this process has had, in millions of bytes; it never falls."""
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere than in ru_maxrss, a process does not begin with the peak of its parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def isolated(function: Callable[..., Result], *arguments: Any) -> Result:
    """Called in a fresh process, for memory and imports that are its own. Function and arguments are pickled."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def check(options: ComparisonOptions) -> None:
    """Refuse what cannot be measured before anything is.

    Raises:
        UserError: no turns, or a file that cannot be written.
    """
    if options.turns < 1:
        raise UserError(f"--turns must be 1 or more, got {options.turns}")
    if options.output:
        make_writable(Path(options.output).parent, "--output")


def report(comparisons: Iterable[Comparison], options: ComparisonOptions) -> None:
    """Print a line for each comparison as soon as it is there; at the end write all to `options.output`."""
    from torch import device

    from dino.runtime.distributed import describe

    about = {**provenance(), "machine": describe(device(options.device))}
    print(f"{about['machine']}; " + ", ".join(f"{name} {found}" for name, found in about["versions"].items()))
    print("medians of theirs and ours, how often ours fits into theirs (single turns), precision", flush=True)
    rows = []
    for comparison in comparisons:
        print(comparison.line(), flush=True)
        rows.append(comparison.as_dict())
    if options.output:
        content = {**about, "comparisons": rows}
        text = json.dumps(content, indent=1) + "\n"
        write_atomically(Path(options.output), lambda temporary: temporary.write_text(text))
