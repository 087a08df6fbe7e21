"""What the benchmarks share: their options, and the frozen features of a labelled train and val set.

Imports no torch, so that `--help` answers at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.runtime.options import option

if TYPE_CHECKING:
    from dino.evaluation.features import Features


@dataclass(frozen=True)
class FeatureOptions:
    """What DINO's eval_knn.py and eval_linear.py both take, under their names, then what they lack."""

    arch: str = option("xcit_small_12_p16", "Backbone: an XCiT name, vit_tiny|small|base, or any timm name.")
    patch_size: int = option(16, "Side of a patch in pixels, for vit_* only; other names carry theirs.")
    pretrained_weights: str = option(
        "", "Zoo name, file or URL of the weights; empty = random weights, a baseline."
    )
    checkpoint_key: str = option("teacher", "Which network of a full DINO checkpoint: teacher or student.")
    batch_size_per_gpu: int = option(128, "Pictures per forward pass.")
    num_workers: int = option(
        10, "Loading processes, at most the usable cores, half of them on a CPU; 0 = none."
    )
    data_path: str = option(
        "/path/to/imagenet/",
        "Folder that holds train/ and val/, each with a folder per class; a torchvision set's name, or demo.",
    )
    image_size: int = option(224, "Side in pixels of the centre crop that the backbone sees.")
    allow_partial: bool = option(False, "Accept weights for less than the whole backbone.")
    seed: int = option(0, "Seed of random weights and of random splits.")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps.")
    precision: str = option("fp32", "Of the forward pass.", choices=("auto", "fp32", "bf16", "fp16"))


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Features of the readable pictures of both sets.

    Attributes:
        train_labels, val_labels: (n,) int64, places in `classes`.
        weights_sha256: of the weights' file; None for random weights.
    """

    train: "Features"
    train_labels: np.ndarray
    val: "Features"
    val_labels: np.ndarray
    classes: list[str]
    weights_sha256: str | None


def labelled_features(options: FeatureOptions) -> LabelledFeatures:
    """Build the backbone, load its weights, extract; says what it does on the way.

    Raises:
        UserError: anything wrong with the model's name, the weights, the pictures or the device.
    """
    import torch

    from dino.evaluation.features import extract_features
    from dino.evaluation.labelled_sets import class_numbers, open_train_and_val
    from dino.runtime.backbones import create_backbone, load_backbone_weights
    from dino.runtime.distributed import pick_device, pick_precision, share_cores

    device = pick_device(options.device)
    train_pictures, val_pictures = open_train_and_val(options.data_path)
    torch.manual_seed(options.seed)
    backbone = create_backbone(options.arch, options.patch_size)
    sha256 = None
    if options.pretrained_weights:
        report = load_backbone_weights(
            backbone,
            options.pretrained_weights,
            key=options.checkpoint_key,
            allow_partial=options.allow_partial,
        )
        sha256 = report.sha256
        print(report)
    else:
        print(f"random weights: a baseline (seed {options.seed}); name weights with --pretrained_weights")
    settings: dict[str, Any] = {
        "size": options.image_size,
        "batch_size": options.batch_size_per_gpu,
        "device": device,
        "precision": pick_precision(options.precision, device),
        "num_workers": share_cores(device, options.num_workers),
    }
    backbone.to(device)
    train = extract_features(backbone, train_pictures, **settings, progress="train features")
    val = extract_features(backbone, val_pictures, **settings, progress="val features")
    for broken in (*train.broken, *val.broken):
        print(f"left out: {broken}")
    count = len(train_pictures.classes)
    print(f"{len(train.names)} training and {len(val.names)} val pictures of {count} classes")
    assert train.labels is not None and val.labels is not None
    return LabelledFeatures(
        train=train,
        train_labels=train.labels,
        val=val,
        val_labels=class_numbers(val_pictures.classes, train_pictures.classes)[val.labels],
        classes=train_pictures.classes,
        weights_sha256=sha256,
    )
