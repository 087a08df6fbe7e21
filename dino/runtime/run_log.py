"""What a run tells: a progress bar, one JSON line per epoch in `log.txt` as DINO writes it, TensorBoard."""

import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dino.runtime.files import write_atomically, writing

NAME = "log.txt"
PREVIOUS_NAME = "log.previous.txt"

# A file or a pipe gets a line now and then instead of a redrawn bar.
_SECONDS_BETWEEN_LINES = 30.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
_LINE = "{desc}: {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of `log.txt`, oldest first, up to the first line that is none, such as a half-written last one."""
    rows: list[dict[str, Any]] = []
    path = folder / NAME
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows


class EpochMeans:
    """Means of a step's measures over the steps of an epoch; the sums can be saved and taken up again."""

    def __init__(self, sums: Mapping[str, float] | None = None) -> None:
        self.sums = dict(sums or {"steps": 0.0, "skipped": 0.0})

    def add(self, measures: Mapping[str, float]) -> None:
        self.sums["steps"] += 1
        for name, value in measures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def skip(self) -> None:
        """Count a step that was not taken."""
        self.sums["skipped"] += 1

    @property
    def skipped(self) -> int:
        return int(self.sums["skipped"])

    def means(self) -> dict[str, float | None]:
        """None for a measure that was not a number."""
        steps = self.sums["steps"]
        sums = {name: value for name, value in self.sums.items() if name not in ("steps", "skipped")}
        return {name: value / steps if math.isfinite(value) else None for name, value in sums.items()}


class RunLog:
    """Bar, log file and TensorBoard of the main process; the other processes stay silent.

    Args:
        folder: where `log.txt` lies; rows of `first_epoch` and later are dropped, since they are trained again.
            What is dropped stays in `log.previous.txt`.
        steps: steps of the whole run.
        first_step: step from which this process goes on.
        pictures_per_step: over all processes, for the rate.
        active: whether this is the main process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        first_step: int,
        first_epoch: int,
        pictures_per_step: int,
        active: bool,
    ) -> None:
        self.path = folder / NAME
        self.pictures_per_step = pictures_per_step
        self.rows: list[dict[str, Any]] = []
        self.steps = steps
        self.first_step = first_step
        self._bar: Any = None
        self._active = active
        self._board = _tensorboard(folder) if active else None
        if active:
            with writing(self.path):
                self.rows = [row for row in read_log(folder) if row.get("epoch", -1) < first_epoch]
            self._write_all()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def start(self) -> None:
        """The first step begins: the time that steps take is counted from here."""
        in_terminal = sys.stderr.isatty()
        interval = 0.5 if in_terminal else _SECONDS_BETWEEN_LINES
        self._bar = tqdm(
            total=self.steps,
            initial=self.first_step,
            file=sys.stderr if in_terminal else _Lines(),
            bar_format=_BAR if in_terminal else _LINE,
            dynamic_ncols=True,
            disable=not self._active,
            mininterval=interval,
            maxinterval=interval,
            delay=interval / 10,  # nothing to show before a step is done
            smoothing=0,  # the mean rate: k-NN between epochs takes its part of the time left
        )

    def step(self, epoch: int, loss: float) -> None:
        """One step is done."""
        if not self._active:
            return
        self._bar.set_description_str(f"epoch {epoch}", refresh=False)
        taken = self._bar.format_dict
        done = taken["n"] + 1 - taken["initial"]
        rate = done * self.pictures_per_step / max(taken["elapsed"], 1e-3)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} pictures/s", refresh=False)
        self._bar.update()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Append one row; it holds `epoch`. Values that are not finite become null: JSON has no words for them.

        Raises:
            UserError: the file cannot be written.
        """
        if not self._active:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        self.rows.append(finite)
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        if self._board:
            for name, value in finite.items():
                if isinstance(value, int | float) and name != "epoch":
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board:
            self._board.close()

    def _write_all(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        with writing(self.path):
            if self.path.exists():
                if self.path.read_text(errors="replace") == text:
                    return
                shutil.copyfile(self.path, self.path.with_name(PREVIOUS_NAME))
        write_atomically(self.path, lambda temporary: temporary.write_text(text))


class _Lines:
    """A stream for tqdm that makes a line of each state of the bar."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            print(line, file=sys.stderr, flush=True)
            self._last = line

    def flush(self) -> None:
        """Every line is flushed as it is written."""


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # the extra `tensorboard` is not installed
        return None
    return SummaryWriter(str(folder / "tensorboard"))
