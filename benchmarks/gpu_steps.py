"""The train step on a GPU at growing batches until its memory is full: ours against the textbook's.

A part of `benchmarks/gpu.py`, which runs it.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import TextbookStep
from benchmarks.comparison import Comparison, milliseconds
from dino.distillation import Rates
from dino.head import DinoHead
from dino.network import MultiCropNetwork
from dino.plan import create_distillation
from dino.runtime.backbones import create_backbone, feature_width
from dino.train_options import TrainOptions

Run = Callable[[], object]

# Of the memory that would be full by the growth seen so far.
_FILLED = 0.93
_BATCH_MULTIPLE = 8
_PEER = "textbook step on timm's XCiT"
_RATES = Rates(lr=5e-4, weight_decay=0.04, momentum=0.996, teacher_temperature=0.04, hold_last_layer=False)


class Ways:
    """Ours and the textbook's, for one backbone.

    Args:
        sizes: sides of the views in pixels, the two global ones first.
    """

    def __init__(self, arch: str, out_dim: int, sizes: Sequence[int], device: torch.device) -> None:
        self.arch = arch
        self.out_dim = out_dim
        self.sizes = sizes
        self.device = device

    def ours(self, batch: int, *, mode: str | None = None, channels_last: bool = False) -> Run:
        """In bf16.

        Args:
            mode: of the compiler; None = not compiled.
            channels_last: memory of the patch embedding and of the views.
        """
        options = TrainOptions(arch=self.arch, out_dim=self.out_dim, compile="false")
        distillation = create_distillation(options, self.device, "bf16")
        views = self._views(batch)
        if channels_last:
            views = [view.contiguous(memory_format=torch.channels_last) for view in views]
            for network in (distillation.student, distillation.teacher):
                network.backbone.patch_embed.to(memory_format=torch.channels_last)
        if mode is not None:
            distillation.student.compile(mode=mode)
            distillation.teacher.compile(mode=mode)

        def run() -> object:
            if mode == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            return distillation.step(views, _RATES)

        return run

    def textbook(self, batch: int) -> Run:
        """Under fp16 autocast."""
        step = TextbookStep(self.arch, self.out_dim, device=str(self.device), autocast=torch.float16)
        views = self._views(batch)
        return lambda: step.step(views)

    def _views(self, batch: int) -> list[Tensor]:
        return [torch.randn(batch, 3, size, size, device=self.device) for size in self.sizes]

    def flops(self) -> float:
        """Of a step, for each picture: forward and backward of the student, forward of the teacher."""
        backbone = create_backbone(self.arch)
        network = MultiCropNetwork(backbone, DinoHead(feature_width(backbone), self.out_dim)).to("meta")
        views = [torch.empty(2, 3, size, size, device="meta") for size in self.sizes]
        with FlopCounterMode(display=False) as counter:
            network(views).logits_VBK.sum().backward()
            with torch.no_grad():
                network(views[:2])
        return counter.get_total_flops() / 2


def step_comparisons(
    ways: Ways, batches: Sequence[int], *, turns: int, modes: Sequence[str], peak_flops: float | None
) -> Iterator[Comparison]:
    """Rows in ms per picture: each way at the largest batch that fits, then variants of ours.

    Args:
        batches: that are tried, rising; on CUDA also the largest that fits.
        modes: of the compiler, to compare without it.
        peak_flops: of the device in bf16, per second; None = not known.
    """
    flops = ways.flops()
    largest = {
        "textbook": _largest(ways.textbook, batches, ways.device, "textbook, fp16"),
        "ours": _largest(ways.ours, batches, ways.device, "ours, bf16"),
    }
    theirs = Steady(ways.textbook(largest["textbook"]), largest["textbook"], ways.device)
    variants: dict[str, dict[str, object]] = {
        "": {},
        ", patch embedding channels-last": {"channels_last": True},
    }
    variants |= {f", compiled ({mode})": {"mode": mode} for mode in modes}
    for name, how in variants.items():
        try:
            ours = Steady(ways.ours(largest["ours"], **how), largest["ours"], ways.device)  # type: ignore[arg-type]
            times = [(theirs.ms_per_picture(), ours.ms_per_picture()) for _ in range(turns)]
        except torch.OutOfMemoryError:
            print(f"train step, {ways.arch}{name}: {largest['ours']} pictures do not fit", flush=True)
            continue
        rates = [1e3 / median(column) for column in zip(*times, strict=True)]
        shares = [f", {rate * flops / peak_flops:.0%} of the peak" if peak_flops else "" for rate in rates]
        yield Comparison(
            f"train step, {ways.arch}, largest batch{name}",
            "ms",
            [pair[0] for pair in times],
            [pair[1] for pair in times],
            peer=_PEER,
            precision="theirs fp16 autocast, ours bf16 autocast",
            target=2.0 if not name or name.startswith(", compiled (default)") else None,
            note=f"per picture; {rates[1]:.0f} pictures/s of {largest['ours']} at once{shares[1]}; "
            f"theirs {rates[0]:.0f} of {largest['textbook']}{shares[0]}; {flops / 1e9:.0f} GFLOP per picture",
        )
        del ours


class Steady:
    """A step that is repeated, after one that does not count: of another step's memory nothing is left then."""

    STEPS = 3

    def __init__(self, run: Run, batch: int, device: torch.device) -> None:
        self.run = run
        self.batch = batch
        self.device = device

    def ms_per_picture(self) -> float:
        _free(self.device)
        milliseconds(self.run, str(self.device))
        return milliseconds(self._several, str(self.device)) / (self.STEPS * self.batch)

    def _several(self) -> None:
        for _ in range(self.STEPS):
            self.run()


def _largest(create: Callable[[int], Run], batches: Sequence[int], device: torch.device, name: str) -> int:
    """Batch that fits; prints the rate of each that was tried."""
    peaks: dict[int, int] = {}
    for batch in batches:
        if not _fits(create, batch, device, name, peaks):
            break
    if not peaks:
        raise torch.OutOfMemoryError(f"{name}: not even {batches[0]} pictures fit")
    if device.type != "cuda" or len(peaks) < 2:
        return max(peaks)
    (few, less), (many, more) = sorted(peaks.items())[-2:]
    total = torch.cuda.get_device_properties(device).total_memory
    room = many + (total * _FILLED - more) * (many - few) / (more - less)
    guess = int(room) // _BATCH_MULTIPLE * _BATCH_MULTIPLE
    while guess > many and not _fits(create, guess, device, name, peaks):
        guess = guess * 9 // 10 // _BATCH_MULTIPLE * _BATCH_MULTIPLE
    return max(peaks)


def _fits(
    create: Callable[[int], Run], batch: int, device: torch.device, name: str, peaks: dict[int, int]
) -> bool:
    """Notes the most memory that was allocated."""
    _free(device)
    try:
        steady = Steady(create(batch), batch, device)
        taken = steady.ms_per_picture()
    except torch.OutOfMemoryError:
        print(f"  {name}: {batch} pictures do not fit", flush=True)
        return False
    peaks[batch] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    print(
        f"  {name}: {batch} pictures, {1e3 / taken:.1f} per second, {peaks[batch] / 1e9:.1f} GB", flush=True
    )
    return True


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
