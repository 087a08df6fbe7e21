"""How do time and memory of a forward pass grow with the picture? Our XCiT against timm's, and against a ViT.

python benchmarks/forward.py --plot docs/resolution.png

Without gradients, on noise, with random weights that are the same in both XCiTs. Memory is the peak of a fresh process
beyond what it holds with the network loaded; the picture counts. `--plot` draws both over the side of the picture, for
a ViT of the same width and depth too: its attention takes time that is quadratic in the pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import timm
import torch
from torch import Tensor, nn

import xcit
from benchmarks.comparison import (
    Comparison,
    ComparisonOptions,
    check,
    in_turns,
    isolated,
    milliseconds,
    peak_megabytes,
    report,
)
from dino.runtime.distributed import autocast, pick_device
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option

_TARGETS = {224: 1.2, 1024: 1.4, 2048: 1.5}
_STEEPEST = 1.15
_LARGE = 1_000_000  # pixels from which a plot is content with one turn
_HUGE_SECONDS_TARGET, _HUGE_MEGABYTES = 3.0, 1500.0
_PEER = "timm's XCiT"
_OURS, _TIMMS, _VIT = "XCiT, this package", "XCiT, timm", "ViT, timm"


@dataclass(frozen=True)
class ForwardOptions(ComparisonOptions):
    arch: str = option("xcit_small_12_p16", "An XCiT name.")
    vit: str = option("vit_small_patch16_224", "The ViT of the plot, by timm's name.")
    batch: int = option(8, "Pictures at the first of --sides; beyond it they come one by one.")
    sides: tuple[int, ...] = option(
        (224, 512, 1024, 2048), "Rows and columns of the pictures in pixels, rising."
    )
    huge: tuple[int, int] = option((4000, 6000), "Rows and columns of one picture in bf16; 0 0 = none.")
    plot: str = option(
        "", "Draw time and memory over the side of the picture into this PNG file; empty = no plot."
    )
    plot_sides: tuple[int, ...] = option((224, 384, 512, 768, 1024, 1536, 2048), "Sides in the plot, rising.")


def measure(options: ForwardOptions) -> None:
    check(options)
    pick_device(options.device)
    if min(*options.sides, *options.plot_sides, options.batch) < 1:
        raise UserError("--sides, --plot_sides and --batch must be 1 or more")
    if options.plot:
        make_writable(Path(options.plot).parent, "--plot")
    report(comparisons(options), options)
    if options.plot:
        draw(options)


def comparisons(options: ForwardOptions) -> Iterator[Comparison]:
    """By sides in float32, growth with the pixels, then one huge picture."""
    ours = create(_OURS, options).to(options.device)
    timms = create(_TIMMS, options).to(options.device)
    timms.load_state_dict(timm.models.xcit.checkpoint_filter_fn(ours.state_dict(), timms))
    of_side = {}
    for side in options.sides:
        batch = options.batch if side == options.sides[0] else 1
        images = torch.randn(batch, 3, side, side, device=options.device)
        times = in_turns(
            lambda images=images: look(timms, images),
            lambda images=images: look(ours, images),
            turns=options.turns if side < 2000 else min(options.turns, 3),
            device=options.device,
        )
        of_side[side] = [time / batch for time in times[1]]
        yield Comparison(
            f"forward, {options.arch}, {batch} x {side} x {side}",
            "ms",
            *times,
            peer=_PEER,
            target=_TARGETS.get(side),
        )
    yield _growth(of_side)
    if min(options.huge):
        yield from _huge(options, ours, timms)


def _growth(of_side: dict[int, list[float]]) -> Comparison:
    small, large = min(of_side), max(of_side)
    linear = median(of_side[small]) * (large / small) ** 2
    return Comparison(
        f"forward, growth from {small} to {large}",
        "ms",
        [_STEEPEST * linear] * len(of_side[large]),
        of_side[large],
        peer=f"{_STEEPEST} times linear in the pixels",
        target=1.0,
    )


def _huge(options: ForwardOptions, ours: nn.Module, timms: nn.Module) -> Iterator[Comparison]:
    rows, cols = options.huge
    images = torch.randn(1, 3, rows, cols, device=options.device)
    precision = "bf16"
    # No call that does not count: one takes a minute.
    times = [
        [milliseconds(lambda network=network: look(network, images, precision), options.device)]
        for network in (timms, ours)
    ]
    name = f"forward, {options.arch}, {cols} x {rows}"
    yield Comparison(name, "ms", *times, peer=_PEER, precision=precision, target=_HUGE_SECONDS_TARGET)
    (needed,) = isolated(_profile, _OURS, replace(options, turns=1), [options.huge], precision)
    yield Comparison(
        f"{name}, memory beyond weights",
        "MB",
        [_HUGE_MEGABYTES],
        [needed[1]],
        "the goal",
        precision,
        target=1.0,
    )


def create(name: str, options: ForwardOptions) -> nn.Module:
    """The network of that name in the plot, with random weights."""
    torch.manual_seed(0)
    if name == _OURS:
        return xcit.create_model(options.arch).eval()
    if name == _TIMMS:
        return timm.create_model(f"{options.arch}_224", num_classes=0).eval()
    return timm.create_model(options.vit, num_classes=0, dynamic_img_size=True).eval()


@torch.inference_mode()
def look(network: nn.Module, images: Tensor, precision: str = "fp32") -> Tensor:
    with autocast(images.device, precision):
        return network(images)


def _profile(
    name: str, options: ForwardOptions, sizes: list[tuple[int, int]], precision: str
) -> list[tuple[float, float]]:
    """Milliseconds, and megabytes beyond the loaded network, for pictures of rising sizes; in a process of its own."""
    network = create(name, options).to(options.device)
    before = _peak(options.device)
    found = []
    for rows, cols in sizes:
        images = torch.randn(1, 3, rows, cols, device=options.device)
        times = [
            milliseconds(lambda images=images: look(network, images, precision), options.device)
            for _ in range(options.turns if rows * cols < _LARGE else 1)
        ]
        found.append((median(times), _peak(options.device) - before))
    return found


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.startswith("cuda") else peak_megabytes()


def draw(options: ForwardOptions) -> None:
    """Two panels, time and memory, with a line for each network."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, colour in ((_OURS, "C0"), (_TIMMS, "C1"), (_VIT, "C3")):
        sizes = [(side, side) for side in options.plot_sides]
        found = isolated(_profile, name, replace(options, turns=3), sizes, "fp32")
        for panel, numbers in zip(panels, zip(*found, strict=True), strict=True):
            panel.plot(options.plot_sides, numbers, "o-", color=colour, markersize=4, label=name)
        print(
            f"{name:20}",
            "  ".join(
                f"{s}: {ms:.0f} ms, {mb:.0f} MB"
                for s, (ms, mb) in zip(options.plot_sides, found, strict=True)
            ),
        )
    for panel, title in zip(panels, ("time (ms)", "memory beyond the weights (MB)"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="side of the picture (pixels)", title=title)
        panel.set_xticks(
            options.plot_sides, [str(side) for side in options.plot_sides], minor=False, fontsize=8
        )
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    write_atomically(Path(options.plot), lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)


if __name__ == "__main__":
    command(ForwardOptions, measure, prog="benchmarks/forward.py", description=__doc__ or "")
