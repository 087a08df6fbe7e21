"""Pictures of what every head looks at, as files.

dino-attention --image_path photo.jpg --pretrained_weights dino_xcit_small_12_p16 --output_dir maps

Imports torch only when there is something to compute.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from dino.attention.render import (
    ByteArray,
    FloatArray,
    MaskOverlay,
    enlarge,
    heat,
    mass_mask,
    normalize,
    save_png,
)
from dino.attention.sheet import AttentionSheet
from dino.runtime.files import make_writable
from dino.runtime.images import BrokenImageError, decode, is_picture_name
from dino.runtime.options import UserError, command, option
from dino.runtime.picture_files import files_in, files_matching, is_pattern

if TYPE_CHECKING:
    from torch import nn

_DESCRIPTION = """Draw the class token's attention, head by head.

Writes img.png (the picture that the network saw), attn-head{j}.png, attn-mean.png, sheet.png (all of them,
labelled) and with --threshold mask_th{threshold}_head{j}.png. For a folder or a pattern, each picture gets a
subfolder of its own name."""

_OWN_OUTPUT = re.compile(r"(img|sheet|attn-(mean|head\d+)|mask_th.+_head\d+)\.png")


@dataclass(frozen=True)
class VisualizeOptions:
    """The flags of DINO's visualize_attention.py, and ours below them."""

    arch: str = option("xcit_small_12_p16", "XCiT name, vit_tiny, vit_small, vit_base, or a timm ViT")
    patch_size: int = option(8, "side of a patch in pixels, for vit_* only: the other names carry theirs")
    pretrained_weights: str = option("", "file, URL or name of published weights; empty: a random network")
    checkpoint_key: str = option("teacher", "part of a training checkpoint to take: teacher or student")
    image_path: str = option(
        "", "a picture, a folder (searched through), or a pattern such as 'photos/*.jpg'"
    )
    image_size: tuple[int, ...] = option(
        (), "pixels: rows and columns, or one number for the short side; none: the picture's own size"
    )
    output_dir: str = option(".", "folder to write to")
    threshold: float | None = option(
        None, "also draw masks of the fewest patches that hold this part of the attention, 0 to 1; None: off"
    )
    device: str = option("auto", "auto, cuda, mps or cpu")
    precision: str = option(
        "auto", "of the network; auto: bf16 where it is fast", choices=("auto", "fp32", "bf16", "fp16")
    )
    smooth: bool = option(False, "interpolate between patches instead of drawing each as a square")
    colormap: str = option("inferno", "any of matplotlib's colormaps")
    allow_partial: bool = option(False, "accept weights that do not fill the whole network")


def main() -> None:
    command(VisualizeOptions, run, prog="dino-attention", description=_DESCRIPTION)


def run(options: VisualizeOptions) -> None:
    """Draw every picture that `options` name.

    Raises:
        UserError: no such picture, or none that can be read; a model without class attention; a folder that
            cannot be written to.
    """
    from dino.attention.maps import attention_maps, patch_side, resize
    from dino.runtime.distributed import pick_device, pick_precision

    image_size = _image_size(options.image_size)
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold is a part of the attention between 0 and 1, got {options.threshold}")
    sheet = AttentionSheet(options.colormap, smooth=options.smooth, tile=288, columns=5)
    pictures = find_pictures(options.image_path, Path(options.output_dir))
    make_writable(Path(options.output_dir), "--output_dir")
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    backbone = _backbone(options)
    patch_size = patch_side(backbone)
    backbone.to(device)

    broken: list[BrokenImageError] = []
    for file, folder in tqdm(pictures, desc="attention", unit="picture", disable=len(pictures) == 1):
        try:
            picture = decode(file, str(file))
        except BrokenImageError as error:
            broken.append(error)
            continue
        image = resize(picture, image_size)
        maps = attention_maps(backbone, image, device=device, precision=precision)
        title = f"{file.name} · {options.arch}"
        whole = sheet([image], [maps], patch_size=patch_size, title=title)
        _write(folder, [("sheet.png", whole), *_layers(image, maps, patch_size, options)])
    _report(broken, len(pictures), options.output_dir)


def find_pictures(image_path: str, output_dir: Path) -> list[tuple[Path, Path]]:
    """The pictures that a path, a folder or a pattern names, each with the folder for its outputs.

    The pictures of a folder keep its tree below `output_dir`. Not taken are what this command has written before,
    and what lies in an `output_dir` inside that folder.

    Raises:
        UserError: there is none.
    """
    if not image_path:
        raise UserError(
            "--image_path is missing: name a picture, a folder, or a pattern such as 'photos/*.jpg'"
        )
    path = Path(image_path).expanduser()
    if path.is_file():
        return [(path, output_dir)]
    files = [file for file in _files(path, image_path) if is_picture_name(file.name) and not _is_output(file)]
    root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files] or [path]))
    names = _outside(output_dir, root, [file.relative_to(root) for file in sorted(files)])
    if not names:
        place = "in this folder or below it" if path.is_dir() else "fit this pattern"
        raise UserError(f"--image_path {image_path}: no pictures {place}")
    times = Counter(name.with_suffix("") for name in names)
    folders = [name if times[name.with_suffix("")] > 1 else name.with_suffix("") for name in names]
    return [(root / name, output_dir / folder) for name, folder in zip(names, folders, strict=True)]


def _files(path: Path, image_path: str) -> list[Path]:
    try:
        if path.is_dir():
            return [path / file for file in files_in(path)]
        if is_pattern(image_path):
            return [Path(file) for file in files_matching(str(path))]
    except OSError as error:
        raise UserError(f"--image_path: cannot read {error.filename or path}: {error.strerror}") from error
    raise UserError(f"--image_path {image_path}: no such file or folder")


def _is_output(file: Path) -> bool:
    siblings = (file.with_name(name) for name in ("sheet.png", "attn-mean.png"))
    return _OWN_OUTPUT.fullmatch(file.name) is not None and all(sibling.exists() for sibling in siblings)


def _outside(output_dir: Path, root: Path, names: list[Path]) -> list[Path]:
    """The names, relative to `root`, without those in an `output_dir` inside it."""
    root, output_dir = root.resolve(), output_dir.resolve()
    if root not in output_dir.parents:
        return names
    return [name for name in names if not (root / name).is_relative_to(output_dir)]


def _image_size(image_size: tuple[int, ...]) -> int | tuple[int, int] | None:
    if len(image_size) > 2 or any(side < 1 for side in image_size):
        given = " ".join(map(str, image_size))
        raise UserError(f"--image_size takes one or two numbers of pixels, at least 1, got {given}")
    match image_size:
        case (rows, cols):
            return rows, cols
        case (short_side,):
            return short_side
    return None


def _backbone(options: VisualizeOptions) -> "nn.Module":
    from dino.runtime.backbones import create_backbone, load_backbone_weights

    backbone = create_backbone(options.arch, options.patch_size)
    if options.pretrained_weights:
        weights = load_backbone_weights(
            backbone,
            options.pretrained_weights,
            key=options.checkpoint_key,
            allow_partial=options.allow_partial,
        )
        print(weights)
    else:
        print("No --pretrained_weights: this network is random, and so is what it attends to.")
    return backbone.eval()


def _layers(
    image: ByteArray, maps: FloatArray, patch_size: int, options: VisualizeOptions
) -> Iterator[tuple[str, ByteArray]]:
    """File names and pixels, one at a time: a large picture's would fill the memory together."""
    size = (image.shape[0], image.shape[1])
    yield "img.png", image
    heads = [(f"head{head}", weights) for head, weights in enumerate(maps)]
    for name, weights in [("mean", maps.mean(axis=0)), *heads]:
        large = enlarge(normalize(weights), patch_size, size, smooth=options.smooth)
        yield f"attn-{name}.png", heat(large, options.colormap)
    if options.threshold is None:
        return
    draw = MaskOverlay()
    for name, weights in heads:
        mask = enlarge(mass_mask(weights, options.threshold), patch_size, size) > 0
        yield f"mask_th{options.threshold}_{name}.png", draw(image, mask)


def _write(folder: Path, layers: "Iterator[tuple[str, ByteArray]] | list[tuple[str, ByteArray]]") -> None:
    make_writable(folder, "--output_dir")
    for name, pixels in layers:
        save_png(pixels, folder / name)


def _report(broken: list[BrokenImageError], count: int, output_dir: str) -> None:
    if len(broken) == count:
        others = f"; nor can the {count - 1} others" if count > 1 else ""
        raise UserError(f"{broken[0]}{others}")
    for error in broken:
        print(f"skipped {error}")
    if count == 1:
        print(f"Drew every head into {output_dir}; sheet.png shows them all.")
    else:
        drawn = count - len(broken)
        print(f"Drew {drawn} of {count} pictures into {output_dir}; each sheet.png shows all heads of one.")


if __name__ == "__main__":
    main()
