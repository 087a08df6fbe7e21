"""A record beside every input's outputs: what they are, and of what. Later runs know them for our own by it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.runtime.files import write_atomically

RECORD = "attention.json"

_LAYER = r"(mean|max|head\d+)"
_STYLE = r"(heat|overlay|contour|mask|colors|cutout)"
_THRESHOLD = r"th[\d.e-]+"
_OUTPUT = re.compile(
    rf"(img|sheet|colors|similarity|pca)\.png|maps\.npz"
    rf"|(attn|overlay|contour)-{_LAYER}\.png|(mask|cutout)_{_THRESHOLD}_{_LAYER}\.png"
    rf"|(video(-{_STYLE})?|mask_{_THRESHOLD})(-({_LAYER}|similarity|pca))?(\.\w+)?"
)


def is_output_name(name: str) -> bool:
    """Whether a file or a folder of frames is called like one of our outputs."""
    return _OUTPUT.fullmatch(name) is not None


def write_record(folder: Path, place: str, files: list[str], facts: Mapping[str, Any]) -> None:
    """Write down what lies in the folder; outputs of earlier runs that still do are kept in mind.

    Args:
        place: what was drawn.
        files: names of the outputs.
        facts: what made them, plain values.

    Raises:
        UserError: it cannot be written.
    """
    earlier = sorted(file for file in recorded_files(folder).difference(files) if (folder / file).exists())
    record = {"input": place, "files": files, "earlier_files": earlier, **facts}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    # Bytes of a file's name that are no text come out as JSON's own escapes.
    write_atomically(
        folder / RECORD,
        lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"),
    )


def recorded_files(folder: Path) -> frozenset[str]:
    """Names of the outputs that lie in the folder by its record; none without a record of ours."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        lists = [record["files"], record.get("earlier_files", [])]
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
    return frozenset(str(file) for files in lists if isinstance(files, list) for file in files)
