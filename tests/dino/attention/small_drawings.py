"""What the tests of the command draw with, and how they look at its files."""

from pathlib import Path

import numpy as np
from PIL import Image

from dino.attention.visualize_options import VisualizeOptions

ARCH = "xcit_nano_12_p16"
HEADS = 4
NAMES = ("mean", "max", *(f"head{head}" for head in range(HEADS)))
ALWAYS = {"img.png", "sheet.png", "attention.json", *(f"attn-{name}.png" for name in NAMES)}


def save_picture(path: Path, rows: int = 37, cols: int = 52) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(rows).integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def options(picture: Path | str, output_dir: Path, **others: object) -> VisualizeOptions:
    given = {
        "arch": ARCH,
        "pretrained_weights": "random",
        "input": (str(picture),),
        "output_dir": str(output_dir),
        "device": "cpu",
        "precision": "fp32",
    }
    return VisualizeOptions(**{**given, **others})
