"""A bar for work longer than a few seconds; in a file or a pipe, a line now and then."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BEFORE_A_BAR = 2.0


def progress(items: Iterable[Item], title: str, unit: str, *, total: int | None = None) -> Iterable[Item]:
    """The items, with rate and time left on standard error when they take long; nothing of it stays there.

    Args:
        total: how many, where `items` do not say.
    """
    in_terminal = sys.stderr.isatty()
    interval = 0.1 if in_terminal else _SECONDS_BETWEEN_LINES
    return tqdm(
        items,
        title,
        total=total,
        unit=unit,
        leave=False,
        delay=_SECONDS_BEFORE_A_BAR if in_terminal else _SECONDS_BETWEEN_LINES,
        mininterval=interval,
        maxinterval=2 * interval,
        dynamic_ncols=True,
    )


def say(line: str) -> None:
    """Print a line, in a terminal above any bar that is shown there."""
    if sys.stderr.isatty():
        tqdm.write(line)
    else:
        print(line, flush=True)
