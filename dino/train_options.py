"""The options of a pre-training run, with DINO's names and defaults. Imports no torch."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dino.presets import PRESETS, PURPOSES
from dino.runtime.options import UserError, option


@dataclass(frozen=True)
class TrainOptions:
    """The 31 options of DINO's main_dino.py under their names, then those that it lacks."""

    arch: str = option("xcit_small_12_p16", "Backbone: an XCiT name, vit_tiny|small|base, or any timm name.")
    patch_size: int = option(16, "Side of a patch in pixels, for vit_* only; other names carry theirs.")
    out_dim: int = option(65536, "Prototypes: outputs of the head.")
    norm_last_layer: bool = option(True, "Keep the prototypes at length 1; false can be unstable.")
    momentum_teacher: float = option(0.996, "Teacher's momentum at the start; rises to 1 by a cosine.")
    use_bn_in_head: bool = option(False, "Batch norm in the head.")
    warmup_teacher_temp: float = option(0.04, "Teacher's temperature at the start.")
    teacher_temp: float = option(0.04, "Teacher's temperature after the warm-up.")
    warmup_teacher_temp_epochs: int = option(0, "Epochs from the one to the other, linearly; 0 = none.")
    use_fp16: bool = option(True, "Mixed precision where the device has it; false = fp32.")
    weight_decay: float = option(0.04, "Weight decay at the start.")
    weight_decay_end: float = option(0.4, "Weight decay at the end, by a cosine.")
    clip_grad: float = option(3.0, "Longest gradient, per parameter (L2 norm); 0 = no clipping.")
    batch_size_per_gpu: int = option(64, "Pictures per process and step.")
    epochs: int = option(100, "Passes over the pictures.")
    freeze_last_layer: int = option(1, "Epochs in which the prototypes are held still; 0 = none.")
    lr: float = option(
        5e-4, "Peak learning rate for 256 pictures per step; scaled linearly with their number."
    )
    warmup_epochs: int = option(10, "Epochs of linear warm-up of the learning rate; 0 = none.")
    min_lr: float = option(1e-6, "Learning rate at the end; not scaled.")
    optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "sgd", "lars"))
    drop_path_rate: float = option(0.1, "Stochastic depth of the student, in [0, 1); 0 = off.")
    global_crops_scale: tuple[float, float] = option((0.4, 1.0), "Share of the picture in a global view.")
    local_crops_number: int = option(8, "Local views per picture; 0 = none.")
    local_crops_scale: tuple[float, float] = option((0.05, 0.4), "Share of the picture in a local view.")
    data_path: str = option(
        "/path/to/imagenet/train/",
        "Pictures: a folder (with classes or without), a .txt or .csv list, a glob, tar shards, "
        "the name of a torchvision set, or demo.",
    )
    output_dir: str = option(".", "Folder for checkpoints, log and pictures; a run found there is continued.")
    saveckp_freq: int = option(20, "Keep checkpointNNNN.pth every so many epochs; 0 = never.")
    seed: int = option(0, "Seed of weights, order and distortions.")
    num_workers: int = option(10, "Loading processes per process, at most the usable cores; 0 = none.")
    dist_url: str = option("env://", "How processes find each other; torchrun's environment by default.")
    local_rank: int = option(0, "Set by old launchers; torchrun's LOCAL_RANK wins.")

    preset: str = option(
        "paper",
        f"Defaults to start from; options given beside it win. {PURPOSES}.",
        choices=tuple(PRESETS),
    )
    global_crops_size: int = option(224, "Side of a global view in pixels.")
    local_crops_size: int = option(96, "Side of a local view in pixels.")
    color_jitter: tuple[float, float, float, float] = option(
        (0.4, 0.4, 0.2, 0.1), "Strength of the change of brightness, contrast, saturation and hue; 0 = none."
    )
    grayscale: float = option(0.2, "Probability of losing all colour.")
    blur: float = option(1.0, "Factor on the probabilities of blur; 1 = the paper's, 0 = off.")
    augment_on: str = option(
        "auto",
        "Where the colours of the views are distorted: by the workers that load the pictures, or in batches on the "
        "device that trains; auto = there if it is a CUDA device.",
        choices=("auto", "workers", "device"),
    )
    head_hidden_dim: int = option(2048, "Width of the head's hidden layers.")
    bottleneck_dim: int = option(256, "Width of the head's bottleneck.")
    centering: str = option(
        "center",
        "What keeps the prototypes in equal use: the paper's centering, or DINOv2's balancing.",
        choices=("center", "sinkhorn_knopp"),
    )
    koleo_weight: float = option(0.0, "Weight of the KoLeo regulariser on the global views; 0 = off.")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps.")
    precision: str = option("auto", "Of the forward pass.", choices=("auto", "fp32", "bf16", "fp16"))
    batch_size: int = option(
        0, "Pictures per step over all processes; 0 = --batch_size_per_gpu x processes x --accumulate."
    )
    accumulate: int = option(
        1,
        "Parts that a process's share of a step is computed in, one after the other: each holds "
        "--batch_size_per_gpu pictures, or its share of --batch_size.",
    )
    grad_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, slower."
    )
    compile: str = option(
        "auto",
        "Compile the networks: faster steps after minutes of compiling, other rounding and random numbers; "
        "auto = on CUDA where torch's compiler works.",
        choices=("auto", "true", "false"),
    )
    init_from: str = option("", "Start from these weights: a zoo name, a file or a URL; empty = random.")
    init_key: str = option("teacher", "Which network of a full DINO checkpoint --init_from takes.")
    allow_partial: bool = option(False, "Accept weights for less than the whole backbone.")
    save_every_minutes: float = option(10.0, "Save within an epoch this often; 0 = at ends of epochs only.")
    max_broken: int = option(100, "Stop after more unreadable pictures than this; -1 = never.")
    knn_freq: int = option(10, "Epochs between k-NN accuracy and attention sheet; 0 = never.")
    knn_data: str = option(
        "", "Labelled pictures for k-NN (train/ and val/, or one set); empty = --data_path."
    )
    knn_drop: float = option(
        5.0, "With --init_from, warn when k-NN falls more than so many points below that before the training."
    )
    knn_max_pictures: int = option(5000, "Pictures used for k-NN, evenly spaced, of each part.")
    eval_size: int = option(0, "Side in pixels for k-NN and attention; 0 = as the global views.")
    wait_minutes: float = option(
        10.0, "A process that waits for the others longer than this gives up; the start may take 3 hours."
    )
    deterministic: bool = option(
        False, "Only algorithms that give the same bits each time: for GPUs, slower."
    )
    on_collapse: str = option("warn", "What a collapse leads to.", choices=("warn", "stop"))


def preset_defaults(arguments: Sequence[str]) -> TrainOptions:
    """The defaults under the `--preset` that the arguments name."""
    name = "paper"
    for position, argument in enumerate(arguments):
        if argument.startswith("--preset="):
            name = argument.partition("=")[2]
        elif argument == "--preset" and position + 1 < len(arguments):
            name = arguments[position + 1]
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(PRESETS)}"
        raise UserError(f"unknown preset '{name}'; {hint}")
    return replace(TrainOptions(), **PRESETS[name].settings)


def preset_lines(options: TrainOptions) -> list[str]:
    """What the preset is for, then what it set, as on the command line, and why; not what was given beside it."""
    preset = PRESETS[options.preset]
    lines = [f"{preset.name}: {preset.purpose} ({preset.status})"]
    for group in preset.groups:
        kept = {key: value for key, value in group.settings.items() if getattr(options, key) == value}
        if kept:
            lines.append(
                f"{' '.join(f'--{key} {_written(value)}' for key, value in kept.items())}: {group.why}"
            )
    return lines


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
