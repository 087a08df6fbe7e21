"""The options that the benchmarks of the features share. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass

from dino.runtime.options import AUTO, option


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
