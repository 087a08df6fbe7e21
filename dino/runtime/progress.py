"""A bar for work longer than a few seconds; in a file or a pipe, a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BEFORE_A_BAR = 2.0


def progress(items: Iterable[Item], title: str, unit: str, *, total: int | None = None) -> Iterable[Item]:
    """The items, with rate and time left on standard error when they take long; nothing of a bar stays there.

    Args:
        total: how many, where `items` do not say.
    """
    if not sys.stderr.isatty():
        return _with_lines(items, title, unit, total)
    return tqdm(
        items, title, total=total, unit=unit, leave=False, delay=_SECONDS_BEFORE_A_BAR, dynamic_ncols=True
    )


def _with_lines(items: Iterable[Item], title: str, unit: str, total: int | None) -> Iterator[Item]:
    if total is None and isinstance(items, Sized):
        total = len(items)
    began = said = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            line = tqdm.format_meter(count, total or 0, now - began, ncols=0, prefix=title, unit=unit)
            print(line, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """Print a line, in a terminal above any bar that is shown there."""
    if sys.stderr.isatty():
        tqdm.write(line)
    else:
        print(line, flush=True)
