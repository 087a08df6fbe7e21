"""A backbone from what a user names: architecture, patch size and weights, each of which may be left to the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dino.runtime.backbones import OLD_NAMES, create_backbone, load_backbone_weights
from dino.runtime.options import AUTO, RANDOM, UserError
from xcit.weights import LoadReport, WeightsError, read_checkpoint, resolve
from xcit.zoo import DINO, PUBLISHED

_DEFAULT_ARCH = "vit_small"  # DINO's


@dataclass(frozen=True, eq=False)
class NamedBackbone:
    """A backbone from what a user names, in evaluation mode, and what it turned out to be.

    Attributes:
        source: name, file or URL of the weights, or `random`.
        seed: of random weights.
        report: what was loaded; None for random weights.
    """

    network: nn.Module
    arch: str
    patch_size: int
    source: str
    seed: int
    report: LoadReport | None

    def __str__(self) -> str:
        return f"{self.arch}: {self.report or f'random weights, a baseline (seed {self.seed})'}"


def open_backbone(
    arch: str,
    patch_size: int,
    source: str,
    *,
    key: str = "teacher",
    allow_partial: bool = False,
    seed: int = 0,
) -> NamedBackbone:
    """Build a backbone and fill it; for `auto`, `random` and an empty name see `resolve_weights`.

    Args:
        key: part of a training checkpoint to take.
        allow_partial: accept weights for less than the whole backbone.
        seed: of random weights.

    Raises:
        UserError: anything wrong with the model's name or the weights.
    """
    arch, patch_size, source = resolve_weights(arch, patch_size, source)
    torch.manual_seed(seed)
    network = create_backbone(arch, patch_size).eval()
    report = None
    if source != RANDOM:
        report = load_backbone_weights(network, source, key=key, allow_partial=allow_partial)
    return NamedBackbone(network, arch, patch_size, source, seed, report)


def published_dino_weights(arch: str, patch_size: int) -> str | None:
    """Name of the published DINO weights of an architecture; None where there are none."""
    arch = OLD_NAMES.get(arch, arch)
    for weights in DINO.values():
        if weights.architecture == arch and weights.patch_size in (None, patch_size):
            return weights.name
    return None


def resolve_weights(arch: str, patch_size: int, source: str) -> tuple[str, int, str]:
    """Architecture, patch size and weights that `auto` and an empty name stand for.

    Args:
        arch: `auto` is what the weights say that they are for, and where they do not say, DINO's vit_small.
        source: published name, file or URL; empty is the published DINO weights of the architecture; `random`
            stays as it is.

    Raises:
        UserError: the weights cannot be had, or there are no published ones.
    """
    if arch == AUTO:
        known = architecture_of(source) if source not in ("", RANDOM) else None
        arch, patch_size = known[0] if known else _DEFAULT_ARCH, (known and known[1]) or patch_size
    if source:
        return arch, patch_size, source
    published = published_dino_weights(arch, patch_size)
    if published is None:
        raise UserError(
            f"there are no published DINO weights of {arch} with patch size {patch_size}: "
            "name weights with --pretrained_weights, or random for a baseline"
        )
    return arch, patch_size, published


def architecture_of(source: str) -> tuple[str, int | None] | None:
    """Architecture and patch size that weights say they are for: a published name, or a checkpoint's options.

    Raises:
        UserError: the file cannot be had or read.
    """
    if source in PUBLISHED:
        return PUBLISHED[source].architecture, PUBLISHED[source].patch_size
    stored = stored_options(source)
    arch, patch_size = stored.get("arch"), stored.get("patch_size")
    if not isinstance(arch, str):
        return None
    return arch, patch_size if isinstance(patch_size, int) else None


def stored_options(source: str) -> Mapping[str, Any]:
    """The options of the training that a checkpoint holds, ours or the original's; empty where it has none.

    Raises:
        UserError: the file cannot be had or read.
    """
    try:
        options = read_checkpoint(resolve(source)).get("args", {})
    except WeightsError as error:
        raise UserError(str(error)) from error
    return options if isinstance(options, Mapping) else getattr(options, "__dict__", {})
