"""What differs between the options of a run that is continued and those of the run before."""

import dataclasses
from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any


def stored_options(args: object) -> dict[str, Any]:
    """By name, as far as they are known; the originals' are a Namespace."""
    named = vars(args) if isinstance(args, Namespace) else args
    if not isinstance(named, Mapping):
        return {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in named.items()}


def changed_options(
    stored: Mapping[str, Any], options: Any, *, besides: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Options whose values are not those of the stored run, as (before, now).

    Args:
        options: a dataclass.
        besides: names that may differ without it being another run.
    """
    now = dataclasses.asdict(options)
    return {
        name: (value, now[name])
        for name, value in stored.items()
        if name in now and name not in besides and value != now[name]
    }


def changes_line(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """One line on all of them."""
    pairs = (f"--{name} {before} -> {now}" for name, (before, now) in changed.items())
    return f"changed:   {', '.join(pairs)}"
