"""How long does it take to draw attention maps? Ours against DINO's script's way, in turns in one process.

python benchmarks/rendering.py --output benchmarks/results/rendering.json

From maps, one value per patch, to one PNG file per head and one of their mean; and to colours without a file. DINO's
way is torch's nearest enlargement and one `plt.imsave` per map; ours is `normalize` and `save_heat_png`, which also
renames the file into its place once it is on the disk. Also what each mark over the picture takes. The maps are made
up: clouds of attention with noise. Times are medians of the turns, in milliseconds.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from PIL import Image

from benchmarks.comparison import Comparison, ComparisonOptions, in_turns, milliseconds
from dino.attention.marks import AttentionOverlay, ContourOverlay, HeadColors, MaskOverlay, cut_out
from dino.attention.render import heat_patches, mass_mask, normalize, save_heat_png
from dino.evaluation.results import provenance
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option

_COLORMAP = "viridis"  # plt.imsave's own
_TARGET = 8.0  # of the PNG files


@dataclass(frozen=True)
class RenderingOptions(ComparisonOptions):
    size: tuple[int, int] = option((720, 1280), "Rows and columns of the picture in pixels.")
    patch_sizes: tuple[int, ...] = option((16, 8), "Sides of a patch in pixels.")
    heads: int = option(8, "Maps, beside their mean.")
    turns: int = option(15, "Measurements of each way, one after the other in turns.")


def measure(options: RenderingOptions) -> None:
    if min(*options.size, *options.patch_sizes, options.heads, options.turns) < 1:
        raise UserError("--size, --patch_sizes, --heads and --turns must be 1 or more")
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    report = {f"patch {patch_size}": _measure(patch_size, options) for patch_size in options.patch_sizes}
    if options.output:
        import torch

        from dino.runtime.distributed import describe

        about = {"machine": describe(torch.device("cpu")), "size": options.size, "heads": options.heads}
        text = json.dumps({**provenance(), **about, **report}, indent=1) + "\n"
        write_atomically(Path(options.output), lambda temporary: temporary.write_text(text))


def comparisons(options: RenderingOptions) -> Iterator[Comparison]:
    for patch_size in options.patch_sizes:
        with tempfile.TemporaryDirectory() as name:
            for comparison, _ in _both_ways(patch_size, options, Path(name)):
                yield comparison


def _both_ways(
    patch_size: int, options: RenderingOptions, folder: Path
) -> Iterator[tuple[Comparison, float]]:
    """PNG files, which are left in the folder, then colours; and the ratio of the processor's time."""
    size, maps = options.size, _maps_for(patch_size, options)
    theirs, ours = folder / "theirs", folder / "ours"
    theirs.mkdir(), ours.mkdir()
    what = f"{options.heads} heads and their mean, {size[0]} x {size[1]}, patch {patch_size}"
    times, processor_ratio = _in_turns(
        lambda: write_like_dino(maps, patch_size, theirs),
        lambda: write(maps, patch_size, size, ours),
        options.turns,
    )
    yield Comparison(f"PNG files of {what}", "ms", *times, "plt.imsave", "", _TARGET), processor_ratio
    times, processor_ratio = _in_turns(
        lambda: color_by_matplotlib(maps, patch_size),
        lambda: [heat_patches(values, patch_size, size) for values in normalize(_with_mean(maps))],
        options.turns,
    )
    yield Comparison(f"colours of {what}", "ms", *times, "matplotlib's colormap", ""), processor_ratio


def _measure(patch_size: int, options: RenderingOptions) -> dict[str, Any]:
    size = options.size
    print(f"{size[0]} x {size[1]} pixels, patches of {patch_size}, {options.heads} heads and their mean")
    with tempfile.TemporaryDirectory() as name:
        folders = Path(name, "theirs"), Path(name, "ours")
        files, colours = (_numbers(*both) for both in _both_ways(patch_size, options, Path(name)))
        files["difference"] = _difference(*folders)
        files["bytes"] = {way.name: sum(file.stat().st_size for file in way.iterdir()) for way in folders}
    for what, numbers in {"PNG files": files, "colours": colours}.items():
        print(
            f"  {what:18} {numbers['theirs']:7.1f} ms   ours {numbers['ours']:6.1f} ms   "
            f"x {numbers['ratio']:.1f} (of single turns {numbers['lowest']:.1f} to {numbers['highest']:.1f}), "
            f"of the processor's time x {numbers['processor_ratio']:.1f}"
        )
    drawings = _marks(_maps_for(patch_size, options), patch_size, size)
    marks = {mark: _median(draw, options.turns) for mark, draw in drawings.items()}
    for mark, taken in marks.items():
        print(f"  {mark:18} {taken:7.1f} ms")
    return {"png_files": files, "colours": colours, "marks_ms": marks}


def _numbers(comparison: Comparison, processor_ratio: float) -> dict[str, Any]:
    lowest, highest = comparison.spread
    return {
        "theirs": median(comparison.theirs),
        "ours": median(comparison.ours),
        "ratio": comparison.ratio,
        "lowest": lowest,
        "highest": highest,
        "processor_ratio": processor_ratio,
    }


def _maps_for(patch_size: int, options: RenderingOptions) -> np.ndarray:
    rows, cols = (-(-side // patch_size) for side in options.size)
    return _maps(options.heads, rows, cols)


def _maps(heads: int, rows: int, cols: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((heads, rows, cols), np.float32)
    clouds = np.stack([cv2.GaussianBlur(layer, (0, 0), cols / 20) for layer in noise])
    logits = 2 * clouds / clouds.std() + 0.5 * noise
    weights = np.exp(logits)
    return weights / weights.sum(axis=(1, 2), keepdims=True)


def _with_mean(maps: np.ndarray) -> np.ndarray:
    return np.concatenate([maps, maps.mean(axis=0, keepdims=True)])


def write(maps: np.ndarray, patch_size: int, size: tuple[int, int], folder: Path) -> None:
    for index, values in enumerate(normalize(_with_mean(maps))):
        save_heat_png(values, patch_size, size, folder / f"{index}.png", colormap=_COLORMAP)


def write_like_dino(maps: np.ndarray, patch_size: int, folder: Path) -> None:
    import matplotlib.pyplot as plt

    for index, large in enumerate(_enlarged(maps, patch_size)):
        plt.imsave(folder / f"{index}.png", large, cmap=_COLORMAP, format="png")


def color_by_matplotlib(maps: np.ndarray, patch_size: int) -> list[np.ndarray]:
    colours = matplotlib.colormaps[_COLORMAP]
    return [colours(Normalize()(large), bytes=True) for large in _enlarged(maps, patch_size)]


def _enlarged(maps: np.ndarray, patch_size: int) -> np.ndarray:
    import torch

    large = torch.nn.functional.interpolate(
        torch.from_numpy(_with_mean(maps))[None], scale_factor=patch_size, mode="nearest"
    )
    return large[0].numpy()


def _marks(maps: np.ndarray, patch_size: int, size: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    scaled, weights = normalize(maps[0]), maps[0]
    kept = mass_mask(weights, 0.6)
    return {
        "normalize": lambda: normalize(maps),
        "mass_mask": lambda: mass_mask(maps, 0.6),
        "overlay": lambda: AttentionOverlay()(image, scaled, patch_size),
        "smooth overlay": lambda: AttentionOverlay(smooth=True)(image, scaled, patch_size),
        "mask": lambda: MaskOverlay()(image, kept, patch_size),
        "contour": lambda: ContourOverlay()(image, weights, patch_size),
        "colours of heads": lambda: HeadColors()(image, maps, patch_size),
        "cut-out": lambda: cut_out(image, kept, patch_size),
    }


def _in_turns(
    theirs: Callable[[], Any], ours: Callable[[], Any], turns: int
) -> tuple[tuple[list[float], list[float]], float]:
    """Milliseconds of both on the clock, and how often ours fits into theirs of the processor's time.

    A machine that is busy with other work adds to the first only.
    """
    spent: tuple[list[float], list[float]] = ([], [])

    def counted(run: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
        def call() -> None:
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)

        return call

    times = in_turns(
        *(counted(run, seconds) for run, seconds in zip((theirs, ours), spent, strict=True)), turns=turns
    )
    return times, median(spent[0][1:]) / median(spent[1][1:])


def _median(draw: Callable[[], Any], turns: int) -> float:
    draw()
    return median(milliseconds(draw) for _ in range(turns))


def _difference(theirs: Path, ours: Path) -> int:
    """The largest between two colours of a pixel, in 256 levels."""
    pairs = [(_pixels(file), _pixels(ours / file.name)) for file in theirs.iterdir()]
    return max(int(np.abs(one[: len(other), : other.shape[1]] - other).max()) for one, other in pairs)


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


if __name__ == "__main__":
    command(RenderingOptions, measure, prog="benchmarks/rendering.py", description=__doc__ or "")
