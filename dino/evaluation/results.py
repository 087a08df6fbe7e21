"""`results.json`: every number with what it takes to trust it and to get it again."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError

NAME = "results.json"

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "faiss-cpu", "dino-xcit")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, Any]:
    """What tells when and by what command and packages something was made."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="seconds"),
        "versions": versions(),
    }


def check_results(folder: Path) -> None:
    """Find out before long work that its results can be written.

    Raises:
        UserError: the folder cannot be written, or its `results.json` is something else.
    """
    make_writable(folder, "--output_dir")
    _read(folder / NAME)


def write_results(folder: Path, name: str, result: Mapping[str, Any]) -> Path:
    """Put a result under its name into the folder's `results.json`; those of other names stay.

    Args:
        name: of the evaluation; its result before is replaced.
        result: plain values; command, date and versions are added.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / NAME
    text = json.dumps({**_read(path), name: {**result, **provenance()}}, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def read_results(folder: Path) -> dict[str, Any]:
    """Everything in the folder's `results.json`, by name; empty where there is none.

    Raises:
        UserError: it is something else.
    """
    return _read(folder / NAME)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is there and is no JSON ({error}); name another --output_dir") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is there and is no file of results; name another --output_dir")
    return content
