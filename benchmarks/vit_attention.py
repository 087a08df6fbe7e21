"""How long does a ViT's class attention take, and how much memory? Ours against attention with its whole matrix.

python benchmarks/vit_attention.py --output benchmarks/results/vit_attention.json

From a picture of uint8 RGB to float32 maps (heads, rows, cols) of the last block. Theirs is the way of DINO's
`get_last_selfattention`: every block builds softmax(q k^T), tokens x tokens for every head, and the maps are the class
token's row of the last one. The memory is the peak of a fresh process, beyond what it holds with the network loaded.
"""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.comparison import (
    Comparison,
    ComparisonOptions,
    check,
    in_turns,
    isolated,
    peak_megabytes,
    report,
)
from dino.attention.maps import attention_maps, patch_side, prepare
from dino.runtime.backbones import create_backbone
from dino.runtime.distributed import autocast
from dino.runtime.options import UserError, command, option

_LARGEST_DIFFERENCE = 1e-5
_TARGET_MS, _TARGET_MB = 2.5, 8.0
_PEER = "softmax(q k^T) in every block"


@dataclass(frozen=True)
class AttentionOptions(ComparisonOptions):
    arch: str = option("vit_small_patch8_224", "A ViT of timm, with random weights.")
    side: int = option(480, "Rows and columns of the picture in pixels.")
    turns: int = option(3, "Measurements of each way, one after the other in turns.")


def measure(options: AttentionOptions) -> None:
    check(options)
    if options.side < 1:
        raise UserError(f"--side must be 1 or more, got {options.side}")
    report(comparisons(options), options)


def comparisons(options: AttentionOptions) -> Iterator[Comparison]:
    name = f"{options.arch}, class attention at {options.side}"
    theirs, ours = ([isolated(_megabytes, way, options)] for way in _WAYS)
    yield Comparison(f"{name}, peak memory", "MB", theirs, ours, peer=_PEER, target=_TARGET_MB)
    vit, image = _open(options)
    _check_equal(*(way(vit, image, device=options.device) for way in _WAYS.values()))
    for precision in ("fp32", "bf16"):
        settings = {"device": options.device, "precision": precision}
        theirs, ours = in_turns(
            partial(full_attention_maps, vit, image, **settings),
            partial(attention_maps, vit, image, **settings),
            turns=options.turns,
            device=options.device,
        )
        target = _TARGET_MS if precision == "fp32" else None
        yield Comparison(f"{name}, {precision}", "ms", theirs, ours, _PEER, precision, target)


def _open(options: AttentionOptions) -> tuple[VisionTransformer, NDArray[np.uint8]]:
    """The network, and a picture (1, side, side, 3)."""
    torch.manual_seed(0)
    vit = create_backbone(options.arch).eval().to(options.device)
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"--arch {options.arch} is no ViT of timm")
    shape = (1, options.side, options.side, 3)
    return vit, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def full_attention_maps(
    vit: VisionTransformer, images: NDArray[np.uint8], device: str = "cpu", precision: str = "fp32"
) -> NDArray[np.float32]:
    """What `attention_maps` gives, (B, heads, rows, cols), with every weight of every block computed."""
    with torch.no_grad(), autocast(torch.device(device), precision):
        pixels = prepare(vit, images, device)
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
        for block in vit.blocks:
            attended, weights = _attend(block.attn, block.norm1(tokens))
            if block is vit.blocks[-1]:
                break
            tokens = tokens + block.ls1(attended)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        of_class_token = weights[:, :, 0, vit.num_prefix_tokens :].float().cpu().numpy()
    grid = (pixels.shape[-2] // patch_side(vit), pixels.shape[-1] // patch_side(vit))
    return of_class_token.reshape(*of_class_token.shape[:2], *grid)


def _attend(attention: Any, tokens_BNC: Tensor) -> tuple[Tensor, Tensor]:
    """What the tokens become, (B, N, C), and the weights (B, heads, N, N)."""
    batch, count, channels = tokens_BNC.shape
    query, key, value = (
        attention.qkv(tokens_BNC).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    )
    weights = ((query @ key.transpose(-2, -1)) * attention.scale).softmax(dim=-1)
    return attention.proj((weights @ value).transpose(1, 2).reshape(batch, count, channels)), weights


def _check_equal(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> None:
    difference = float(np.abs(theirs - ours).max())
    if not difference < _LARGEST_DIFFERENCE:
        raise RuntimeError(f"the two ways differ by {difference}: they are not the same attention")


def _megabytes(way: str, options: AttentionOptions) -> float:
    """In a fresh process: the most that one call holds beyond the network, in millions of bytes."""
    vit, image = _open(options)
    run, patch = _WAYS[way], patch_side(vit)
    run(vit, image[:, :patch, :patch], device=options.device)  # what libraries set up once
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(options.device)
        before = torch.cuda.memory_allocated(options.device)
        run(vit, image, device=options.device)
        return (torch.cuda.max_memory_allocated(options.device) - before) / 1e6
    before = _resident_megabytes()
    run(vit, image, device=options.device)
    return peak_megabytes() - before


def _resident_megabytes() -> float:
    """What this process holds now, as Linux tells it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


_WAYS = {"theirs": full_attention_maps, "ours": attention_maps}


if __name__ == "__main__":
    command(AttentionOptions, measure, prog="benchmarks/vit_attention.py", description=__doc__ or "")
