"""What the benchmarks share: their options, the backbone that they judge, and its frozen features.

Imports no torch, so that `--help` answers at once.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.runtime.options import UserError, option

if TYPE_CHECKING:
    import torch

    from dino.evaluation.extraction import Extractor, Features
    from dino.evaluation.feature_cache import Origin
    from dino.runtime.pictures import Pictures

AUTO = "auto"
RANDOM = "random"

_DEFAULT_ARCH = "vit_small"  # DINO's

_LEAST = {"patch_size": 1, "image_size": 1, "batch_size_per_gpu": 1, "num_workers": 0, "seed": 0}


@dataclass(frozen=True)
class BackboneOptions:
    """Which backbone, how it is run, and where results go; the originals' names and defaults, then new ones."""

    arch: str = option(
        AUTO,
        "Backbone: an XCiT name, vit_tiny|small|base, or any timm name; auto = what the weights say that they are "
        "for, and where they do not say, vit_small.",
    )
    patch_size: int = option(16, "Side of a patch in pixels, for vit_* only; other names carry theirs.")
    pretrained_weights: str = option(
        "",
        "Weights: published name, file or URL; random = random weights, a baseline; "
        "empty = the published DINO weights of --arch.",
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
    dist_url: str = option("env://", "Where processes meet; env:// = as torchrun says.")
    local_rank: int = option(0, "GPU of this process where torchrun does not say it.")
    image_size: int = option(224, "Side in pixels of the centre crop that the backbone sees.")
    as_stored: bool = option(
        False,
        "Read pictures exactly as DINO's scripts did: EXIF orientation, colour profiles, transparency and 16 bits "
        "are ignored. false = they are honoured.",
    )
    allow_partial: bool = option(False, "Accept weights for less than the whole backbone.")
    seed: int = option(0, "Seed of random weights and of random splits.")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps.")
    precision: str = option(
        "fp32",
        "Of the forward pass; fp32 is DINO's; auto = bf16 where the device has it. Features of half precision are "
        "kept as float16.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True)
class FeatureOptions(BackboneOptions):
    output_dir: str = option(".", "Folder for results.json and what else the evaluation writes.")
    features_dir: str = option(
        "",
        "Folder that keeps features, some GB for ImageNet: a later evaluation of the same weights and pictures "
        "takes them from there. Empty = they are not kept.",
    )


@dataclass(frozen=True, eq=False)
class Subject:
    """The backbone that is judged, on its device, and what is known of it.

    Attributes:
        extractor: shows it pictures, prepared as the options say.
        origin: what it is.
        facts: the same and the settings, as plain values for `results.json`.
    """

    extractor: "Extractor"
    origin: "Origin"
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Features of the readable pictures of both sets.

    Attributes:
        train_labels, val_labels: (n,) int64, places in `classes`.
        one_set: val is train: there is one set only, to be judged leaving one out.
        facts: about subject and pictures, as plain values for `results.json`.
    """

    train: "Features"
    train_labels: np.ndarray
    val: "Features"
    val_labels: np.ndarray
    classes: list[str]
    one_set: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def create_subject(options: BackboneOptions, device: "torch.device") -> Subject:
    """Build the backbone and load its weights; the main process says what it does.

    Raises:
        UserError: anything wrong with the model's name, the weights or the device.
    """
    import torch

    from dino.evaluation.extraction import Extractor, Preparation
    from dino.evaluation.feature_cache import Origin
    from dino.runtime import distributed
    from dino.runtime.backbones import (
        check_side,
        create_backbone,
        load_backbone_weights,
        tensors_sha256,
    )

    _check_numbers(options)
    options = resolve_weights(options)
    torch.manual_seed(options.seed)
    backbone = create_backbone(options.arch, options.patch_size)
    check_side(backbone, options.image_size, "--image_size")
    file_sha256 = None
    if options.pretrained_weights == RANDOM:
        say(f"{options.arch}: random weights, a baseline (seed {options.seed})")
    else:
        report = load_backbone_weights(
            backbone,
            options.pretrained_weights,
            key=options.checkpoint_key,
            allow_partial=options.allow_partial,
        )
        file_sha256 = report.sha256
        say(f"{options.arch}: {report}")
    preparation = Preparation(
        size=options.image_size, precision=distributed.pick_precision(options.precision, device)
    )
    extractor = Extractor(
        backbone.to(device),
        preparation,
        batch_size=options.batch_size_per_gpu,
        device=device,
        num_workers=distributed.share_cores(device, options.num_workers),
    )
    origin = Origin(options.arch, tensors_sha256(backbone), options.pretrained_weights, file_sha256)
    facts = {
        **asdict(origin),
        "seed": options.seed,
        "device": distributed.describe(device),
        "processes": distributed.world_size(),
        "preprocessing": {**asdict(preparation), "as_stored": options.as_stored},
        "options": asdict(options),
    }
    return Subject(extractor, origin, facts)


def _check_numbers(options: BackboneOptions) -> None:
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be {least} or more, got {getattr(options, name)}")
    if options.seed >= 2**63:
        raise UserError(f"--seed must be below 2^63, got {options.seed}")


def resolve_weights(options: BackboneOptions) -> BackboneOptions:
    """The same with the architecture and the weights that `auto` and an empty name stand for.

    Raises:
        UserError: the weights cannot be had, or there are no published ones.
    """
    from dino.runtime.backbones import architecture_of, published_dino_weights

    source = options.pretrained_weights
    if options.arch == AUTO:
        known = architecture_of(source) if source not in ("", RANDOM) else None
        arch, patch_size = known or (_DEFAULT_ARCH, None)
        options = replace(options, arch=arch, patch_size=patch_size or options.patch_size)
    if not source:
        published = published_dino_weights(options.arch, options.patch_size)
        if published is None:
            raise UserError(
                f"there are no published DINO weights of {options.arch} with patch size {options.patch_size}: "
                "name weights with --pretrained_weights, or random for a baseline"
            )
        options = replace(options, pretrained_weights=published)
    return options


def set_features(
    options: FeatureOptions, subject: Subject, name: str, pictures: "Pictures", kinds: Sequence[str]
) -> tuple["Features", str]:
    """Features of one set, and the fingerprint of its pictures; all processes call it, the main one uses them.

    Raises:
        UserError: see `cached_features`.
    """
    from dino.evaluation.feature_cache import cached_features
    from dino.runtime import distributed
    from dino.runtime.fingerprint import fingerprint

    pictures.as_stored = options.as_stored
    # One process asks the disk for all files, and all go by the same answer.
    (data,) = distributed.gather([fingerprint(pictures)] if distributed.is_main() else [])
    if not options.features_dir and distributed.world_size() == 1:
        features = subject.extractor.extract(pictures, kinds, progress=f"{name} features")
    else:
        with _feature_folder(options.features_dir) as folder:
            features = cached_features(
                folder, name, subject.extractor, pictures, kinds, origin=subject.origin, data=data, say=say
            )
            if not options.features_dir and distributed.is_main():
                in_memory = {kind: np.array(rows) for kind, rows in features.rows.items()}
                features = replace(features, rows=in_memory)
    for broken in features.broken:
        say(f"left out: {broken}")
    return features, data.content


@contextmanager
def _feature_folder(features_dir: str) -> Iterator[Path]:
    """The folder that all processes write into; one that nobody named is gone afterwards."""
    from dino.runtime import distributed

    if features_dir:
        yield Path(features_dir)
        return
    (folder,) = distributed.gather([tempfile.mkdtemp(prefix="features-")] if distributed.is_main() else [])
    try:
        yield Path(folder)
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def labelled_features(options: FeatureOptions, *, one_set_will_do: bool = False) -> LabelledFeatures | None:
    """Features of the train and val pictures; None in all but the main process.

    Args:
        one_set_will_do: pictures without a val part are accepted, and are both.

    Raises:
        UserError: anything wrong with the model's name, the weights, the pictures or the device.
    """
    from dino.runtime import distributed

    device = distributed.pick_device(options.device, options.local_rank)
    with distributed.processes(device, dist_url=options.dist_url):
        with distributed.together():
            subject = create_subject(options, device)
        return extract_both(options, subject, one_set_will_do=one_set_will_do)


def extract_both(
    options: FeatureOptions, subject: Subject, *, one_set_will_do: bool = False
) -> LabelledFeatures | None:
    """The same for a backbone that is there; all processes call it, and the main one gets the features.

    Raises:
        UserError: anything wrong with the pictures, or with the disk.
    """
    from dino.evaluation.extraction import standard_kinds
    from dino.evaluation.labelled_sets import class_numbers, open_one_or_two
    from dino.runtime import distributed

    with distributed.together():
        train_pictures, val_pictures = open_one_or_two(
            options.data_path, one_will_do=one_set_will_do, say=say
        )
    distributed.share_cores(subject.extractor.device, options.num_workers)  # one before may have taken all
    kinds = standard_kinds(subject.extractor.backbone)
    train, train_data = set_features(options, subject, "train", train_pictures, kinds)
    val, val_data = train, train_data
    if val_pictures:
        val, val_data = set_features(options, subject, "val", val_pictures, kinds)
    if not distributed.is_main():
        return None
    distributed.take_all_cores()
    assert train.labels is not None and val.labels is not None
    classes = train_pictures.classes
    numbers = class_numbers((val_pictures or train_pictures).classes, classes)
    say(
        f"{len(train.names)} training and {len(val.names)} val pictures of {len(classes)} classes"
        if val_pictures
        else f"{len(train.names)} pictures of {len(classes)} classes, one set: each is judged by all others"
    )
    facts = {
        **subject.facts,
        "data_path": options.data_path,
        "data_sha256": {"train": train_data, "val": val_data},
        "pictures": {"train": len(train.names), "val": len(val.names)},
        "classes": classes,
        "broken": [*train.broken, *(val.broken if val_pictures else [])],
    }
    return LabelledFeatures(
        train=train,
        train_labels=train.labels,
        val=val,
        val_labels=numbers[val.labels],
        classes=classes,
        one_set=val_pictures is None,
        facts=facts,
    )


def say(line: str) -> None:
    """Print a line from the main process."""
    from dino.runtime.distributed import is_main

    if is_main():
        print(line, flush=True)
