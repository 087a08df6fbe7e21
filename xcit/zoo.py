"""The 14 architectures of the paper and every published weights file, as tables; models by name."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xcit.model import XCiT
from xcit.pyramid import Pyramid
from xcit.trunk import Trunk


@dataclass(frozen=True)
class Architecture:
    """What tells one XCiT from another (XCiT, table 1); see `XCiT` for the meaning of each."""

    embed_dim: int
    depth: int
    num_heads: int
    eta: float
    tokens_norm: bool
    patch_size: int


def _both_patch_sizes(
    size: str, embed_dim: int, depth: int, num_heads: int, tokens_norm: bool = True
) -> dict[str, Architecture]:
    eta = 1.0 if depth <= 12 else 1e-5
    return {
        f"xcit_{size}_p{patch_size}": Architecture(embed_dim, depth, num_heads, eta, tokens_norm, patch_size)
        for patch_size in (16, 8)
    }


ARCHITECTURES: dict[str, Architecture] = {
    **_both_patch_sizes("nano_12", 128, 12, 4, tokens_norm=False),
    **_both_patch_sizes("tiny_12", 192, 12, 4),
    **_both_patch_sizes("tiny_24", 192, 24, 4),
    **_both_patch_sizes("small_12", 384, 12, 8),
    **_both_patch_sizes("small_24", 384, 24, 8),
    **_both_patch_sizes("medium_24", 512, 24, 8),
    **_both_patch_sizes("large_24", 768, 24, 16),
}

# Not in the paper and without published weights: for CPUs, tests and the demo.
MINIATURES: dict[str, Architecture] = {"xcit_pico_3_p8": Architecture(96, 3, 4, 1.0, True, 8)}


@dataclass(frozen=True)
class PublishedWeights:
    """One file of the authors, with ImageNet-1k accuracies in percent; None where there is no figure.

    Attributes:
        architecture: name in `ARCHITECTURES`, `vit_small|vit_base`, or `resnet50`.
        patch_size: of `vit_*`, whose names do not tell it; None for the others.
        input_size: side in pixels at which the accuracies were measured.
        distilled: trained with hard distillation.
        top1: as the authors give it.
        timm_top1: as timm measured it again.
        knn: 20 nearest neighbours on frozen features.
        linear: linear probe on frozen features.
        linear_url: weights of that probe.
        linear_blocks: of `vit_*`, how many of the last blocks' class tokens it was given.
        linear_patch_mean: of `vit_*`, whether the mean of the patch tokens beside them.
    """

    name: str
    architecture: str
    url: str
    patch_size: int | None = None
    input_size: int = 224
    distilled: bool = False
    top1: float | None = None
    timm_top1: float | None = None
    knn: float | None = None
    linear: float | None = None
    linear_url: str | None = None
    linear_blocks: int = 1
    linear_patch_mean: bool = False


_SUPERVISED_URL = "https://dl.fbaipublicfiles.com/xcit/{0}.pth"
_DINO_URL = "https://dl.fbaipublicfiles.com/dino/{0}_pretrain/{0}_{1}.pth"

_SUPERVISED_FILES = (("224", 224, False), ("224_dist", 224, True), ("384_dist", 384, True))

# (authors' top-1, timm's top-1) for each of the files above.
_SUPERVISED_TOP1 = {
    "xcit_nano_12_p16": ((69.9, 69.982), (72.2, 72.318), (75.4, 75.460)),
    "xcit_tiny_12_p16": ((77.1, 77.122), (78.6, 78.572), (80.9, 80.954)),
    "xcit_tiny_24_p16": ((79.4, 79.474), (80.4, 80.462), (82.6, 82.580)),
    "xcit_small_12_p16": ((82.0, 81.982), (83.3, 83.354), (84.7, 84.734)),
    "xcit_small_24_p16": ((82.6, 82.588), (83.9, 83.880), (85.1, 85.102)),
    "xcit_medium_24_p16": ((82.7, 82.630), (84.3, 84.292), (85.4, 85.434)),
    "xcit_large_24_p16": ((82.9, 82.886), (84.9, 84.936), (85.8, 85.778)),
    "xcit_nano_12_p8": ((73.8, 73.900), (76.3, 76.330), (77.8, 77.810)),
    "xcit_tiny_12_p8": ((79.7, 79.710), (81.2, 81.214), (82.4, 82.394)),
    "xcit_tiny_24_p8": ((81.9, 81.888), (82.6, 82.578), (83.7, 83.784)),
    "xcit_small_12_p8": ((83.4, 83.354), (84.2, 84.252), (85.1, 85.068)),
    "xcit_small_24_p8": ((83.9, 83.854), (84.9, 84.878), (85.6, 85.580)),
    "xcit_medium_24_p8": ((83.7, 83.744), (85.1, 85.078), (85.8, 85.842)),
    "xcit_large_24_p8": ((84.4, 84.380), (85.4, 85.396), (86.0, 86.024)),
}

SUPERVISED: dict[str, PublishedWeights] = {
    f"{architecture}_{suffix}": PublishedWeights(
        name=f"{architecture}_{suffix}",
        architecture=architecture,
        url=_SUPERVISED_URL.format(f"{architecture}_{suffix}"),
        input_size=input_size,
        distilled=distilled,
        top1=top1,
        timm_top1=timm_top1,
    )
    for architecture, accuracies in _SUPERVISED_TOP1.items()
    for (suffix, input_size, distilled), (top1, timm_top1) in zip(_SUPERVISED_FILES, accuracies, strict=True)
}

# name: (architecture, patch size, name of the file, k-NN, linear) (README of facebookresearch/dino).
_DINO_FILES = {
    "dino_xcit_small_12_p16": ("xcit_small_12_p16", None, "dino_xcit_small_12_p16", 76.0, 77.8),
    "dino_xcit_small_12_p8": ("xcit_small_12_p8", None, "dino_xcit_small_12_p8", 77.1, 79.2),
    "dino_xcit_medium_24_p16": ("xcit_medium_24_p16", None, "dino_xcit_medium_24_p16", 76.4, 78.8),
    "dino_xcit_medium_24_p8": ("xcit_medium_24_p8", None, "dino_xcit_medium_24_p8", 77.9, 80.3),
    "dino_vit_small_16": ("vit_small", 16, "dino_deitsmall16", 74.5, 77.0),
    "dino_vit_small_8": ("vit_small", 8, "dino_deitsmall8", 78.3, 79.7),
    "dino_vit_base_16": ("vit_base", 16, "dino_vitbase16", 76.1, 78.2),
    "dino_vit_base_8": ("vit_base", 8, "dino_vitbase8", 77.4, 80.1),
    "dino_resnet50": ("resnet50", None, "dino_resnet50", 67.5, 75.3),
}

DINO: dict[str, PublishedWeights] = {
    name: PublishedWeights(
        name=name,
        architecture=architecture,
        url=_DINO_URL.format(file, "pretrain"),
        patch_size=patch_size,
        knn=knn,
        linear=linear,
        linear_url=_DINO_URL.format(file, "linearweights"),
        linear_blocks=4 if architecture == "vit_small" else 1,
        linear_patch_mean=architecture == "vit_base",
    )
    for name, (architecture, patch_size, file, knn, linear) in _DINO_FILES.items()
}

PUBLISHED: dict[str, PublishedWeights] = {**SUPERVISED, **DINO}


def list_models(all: bool = False) -> list[str]:
    """Names of the paper's models; with `all`, of the miniatures too."""
    return [*ARCHITECTURES, *(MINIATURES if all else ())]


def create_model(
    name: str,
    *,
    num_classes: int = 0,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    weights: str | Path | None = None,
) -> XCiT:
    """A model by name, freshly initialised or with weights.

    Args:
        name: see `list_models(all=True)`.
        num_classes: 0 for no head: the model then returns class tokens (B, num_features).
        in_chans: channels of the images.
        drop_path_rate: stochastic depth, in [0, 1).
        weights: name in `PUBLISHED`, file, or URL; it must hold the whole model.

    Raises:
        ValueError: the name is unknown; the nearest ones are offered.
        WeightsError: the weights cannot be had or do not fit.
    """
    architecture = _architecture(name)
    model = XCiT(
        **_of_the_blocks(architecture),
        tokens_norm=architecture.tokens_norm,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_path_rate=drop_path_rate,
    )
    if weights is not None:
        from xcit.weights import load_weights  # here, because the loader looks names up in this table

        load_weights(model, weights)
    return model


def create_pyramid(
    name: str, *, in_chans: int = 3, drop_path_rate: float = 0.0, weights: str | Path | None = None
) -> Pyramid:
    """A model's blocks as a pyramid of feature maps; what leads from them to the levels is freshly initialised.

    Args:
        name: see `list_models(all=True)`.
        in_chans: channels of the images.
        drop_path_rate: stochastic depth, in [0, 1).
        weights: of a whole backbone: name in `PUBLISHED`, file, or URL; what comes after its blocks is left over.

    Raises:
        ValueError: the name is unknown; the nearest ones are offered.
        WeightsError: the weights cannot be had or do not fit.
    """
    trunk = Trunk(**_of_the_blocks(_architecture(name)), in_chans=in_chans, drop_path_rate=drop_path_rate)
    trunk.init_weights()
    if weights is not None:
        from xcit.weights import load_weights

        load_weights(trunk, weights)
    return Pyramid(trunk)


def _architecture(name: str) -> Architecture:
    known = {**ARCHITECTURES, **MINIATURES}
    if name not in known:
        raise ValueError(f"unknown model '{name}'; {nearest(name, list_models(all=True))}")
    return known[name]


def _of_the_blocks(architecture: Architecture) -> dict[str, Any]:
    """What `Trunk` takes."""
    return {
        "patch_size": architecture.patch_size,
        "embed_dim": architecture.embed_dim,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "eta": architecture.eta,
    }


def architecture_like(depth: int, embed_dim: int, patch_size: int) -> str | None:
    """The name of the model with these measures, by which all of them differ; None where there is none."""
    measures = (depth, embed_dim, patch_size)
    for name, each in {**ARCHITECTURES, **MINIATURES}.items():
        if (each.depth, each.embed_dim, each.patch_size) == measures:
            return name
    return None


def nearest(name: str, known: list[str]) -> str:
    """A hint for an unknown name: the nearest known ones, or all of them."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(matches)}?" if matches else f"known: {', '.join(known)}"
