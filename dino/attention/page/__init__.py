"""One-file html pages: style sheets, scripts and data inside, links only to files beside them.

A page asks no network for anything, and its browser is told to refuse if something in it should: the only
scripts that run are those put in here, known by their checksum.
"""

import base64
import hashlib
import html
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

_PLACE = re.compile(r"\{\{(\w+)\}\}")


def assemble(template: str, *, styles: Sequence[str], scripts: Sequence[str], parts: dict[str, str]) -> str:
    """The page: a template of this folder with its places, `{{name}}`, filled.

    Args:
        template: file name of the html, with places for `head` and `script` beside those of `parts`.
        styles: file names, joined in this order.
        scripts: file names, joined in this order.
        parts: html for each place, escaped already; `title` among them.
    """
    script = "\n".join(map(_asset, scripts))
    filled = {"style": "\n".join(map(_asset, styles)), "script": script, "policy": _policy(script), **parts}
    html = _asset(template).replace("{{head}}", _asset("head.html").rstrip())
    return _PLACE.sub(lambda place: filled[place[1]], html)


def escape(text: str) -> str:
    """Text as html, also between quotes; bytes of a file's name that are no text become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def link(target: Path, folder: Path) -> str:
    """The address of a file relative to a page in `folder`, percent-encoded: any name is safe in it."""
    return quote(os.fsencode(Path(os.path.relpath(target, folder)).as_posix()))


def _asset(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    here = "'self' file:"
    return (
        f"default-src 'none'; img-src {here} data:; media-src {here}; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{checksum}'"
    )
