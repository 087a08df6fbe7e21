"""The options of classification: those of XCiT's main.py under their names, then those that it lacks. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dino.downstream.classification.presets import PRESETS
from dino.downstream.run_options import (
    RunOptions,
    check_run_options,
    require,
    require_at_least,
)
from dino.runtime.options import AUTO, UserError, option

SCHEDULES = ("cosine", "step", "multistep", "tanh", "poly")
INATURALIST_LEVELS = (*("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"),)

_NO_EFFECT = "Accepted, without effect:"


@dataclass(frozen=True)
class ClassifyOptions(RunOptions):
    batch_size: int = option(64, "Pictures per process and step.")
    epochs: int = option(400, "Passes over the training pictures.")
    model: str = option(
        AUTO,
        "Backbone: an XCiT name, vit_tiny|small|base, or any timm name; auto = what the weights say that they are "
        "for, else xcit_small_12_p16.",
        aliases=("arch",),
    )
    patch_size: int = option(16, "Side of a patch in pixels, for vit_* only; other names carry theirs.")
    input_size: int = option(224, "Side of the pictures in pixels.")
    drop: float = option(0.0, "Dropout rate; XCiT has none, and takes 0 alone.")
    drop_path: float = option(0.1, "Stochastic depth, in [0, 1); 0 = off.")

    model_ema: bool = option(True, "Keep a moving average of the weights, which is evaluated too.")
    model_ema_decay: float = option(0.99996, "Its share of the old at each step, in [0, 1).")
    model_ema_warmup: bool = option(
        False, "Let that share rise from 0, for runs that are too short for the average to come along."
    )
    model_ema_force_cpu: bool = option(False, "Keep it in the machine's memory instead of the GPU's.")

    opt: str = option("adamw", "Optimizer: adamw, sgd, lamb, or any name that timm knows.")
    opt_eps: float = option(1e-8, "The optimizer's epsilon; 0 = its own default.")
    opt_betas: tuple[float, ...] = option((), "The optimizer's betas; empty = its own default.")
    clip_grad: float = option(0.0, "Longest gradient, over all parameters (L2 norm); 0 = no clipping.")
    momentum: float = option(0.9, "Momentum of SGD.")
    weight_decay: float = option(0.05, "Weight decay; none on biases and one-dimensional parameters.")
    layer_decay: float = option(
        1.0, "Factor on the learning rate from each layer to the one before it, in (0, 1]; 1 = off."
    )

    sched: str = option("cosine", "How the learning rate falls.", choices=SCHEDULES)
    lr: float = option(
        5e-4, "Peak learning rate for 512 pictures per step; scaled linearly with their number."
    )
    lr_noise: tuple[float, ...] = option(
        (), "Shares of the run between which the rate is noisy; empty = off."
    )
    lr_noise_pct: float = option(0.67, "Limit of that noise, as a share of the rate.")
    lr_noise_std: float = option(1.0, "Standard deviation of that noise.")
    warmup_lr: float = option(1e-6, "Learning rate at the start; not scaled.")
    min_lr: float = option(1e-5, "Learning rate at the end; not scaled.")
    decay_epochs: float = option(30.0, "Epochs between two steps of --sched step.")
    warmup_epochs: int = option(5, "Epochs of linear warm-up of the learning rate; 0 = none.")
    cooldown_epochs: int = option(10, f"{_NO_EFFECT} in the original they lie beyond the last epoch.")
    patience_epochs: int = option(10, f"{_NO_EFFECT} of a schedule that is not offered.")
    decay_rate: float = option(0.1, "Factor of each step of --sched step.", aliases=("dr",))

    color_jitter: float = option(
        0.4, "Change of brightness, contrast, saturation, where --aa is none; 0 = off."
    )
    aa: str = option("rand-m9-mstd0.5-inc1", "RandAugment or AutoAugment as timm writes them; none = off.")
    smoothing: float = option(0.1, "Label smoothing, in [0, 1); 0 = off.")
    train_interpolation: str = option(
        "bicubic", "Of training crops.", choices=("random", "bilinear", "bicubic")
    )
    repeated_aug: bool = option(
        True, "Show each picture three times in a row, and a third of them per epoch."
    )
    reprob: float = option(0.25, "Probability that a rectangle is erased; 0 = off.")
    remode: str = option("pixel", "What it is filled with.", choices=("pixel", "rand", "const"))
    recount: int = option(1, "Rectangles.")
    resplit: bool = option(False, f"{_NO_EFFECT} there are no augmentation splits.")
    crop_scale: tuple[float, float] = option((0.08, 1.0), "Share of the picture in a training crop.")
    mixup: float = option(0.8, "Alpha of mixup; 0 = off.")
    cutmix: float = option(1.0, "Alpha of CutMix; 0 = off.")
    cutmix_minmax: tuple[float, ...] = option(
        (), "Least and largest side of CutMix as shares, instead of its alpha; empty = off."
    )
    mixup_prob: float = option(1.0, "Probability of either.")
    mixup_switch_prob: float = option(0.5, "Probability of CutMix where both are on.")
    mixup_mode: str = option("batch", "What shares one mixture.", choices=("batch", "pair", "elem"))

    teacher_model: str = option(
        "regnety_160", "Teacher of the distillation: a name of timm, or of a backbone here."
    )
    teacher_path: str = option("", "Its weights: file or URL; empty = those that timm offers for it.")
    distillation_type: str = option(
        "none", "Learn from a teacher's outputs.", choices=("none", "soft", "hard")
    )
    distillation_alpha: float = option(0.5, "Share of the teacher in the loss, in [0, 1].")
    distillation_tau: float = option(1.0, "Temperature of soft distillation.")

    data_path: str = option(
        "/datasets01/imagenet_full_size/061417/",
        "Folder that holds train/ and val/, each with a folder per class, or all else that dino.train takes; or the "
        "root of --data_set.",
    )
    data_set: str = option(
        "IMNET",
        "IMNET = what --data_path says; CIFAR10, CIFAR100, CARS, FLOWERS, INAT, INAT19, or the name of a torchvision "
        "set, below --data_path.",
    )
    inat_category: str = option("name", "Classes of INAT and INAT19.", choices=INATURALIST_LEVELS)
    resume: str = option("", "Checkpoint to go on from where --output_dir has none.")
    start_epoch: int = option(0, f"{_NO_EFFECT} a checkpoint knows where it stands.")
    eval: bool = option(False, "Only evaluate the weights.")
    dist_eval: bool = option(False, f"{_NO_EFFECT} all processes share the evaluation.")
    pin_mem: bool = option(True, f"{_NO_EFFECT} memory is pinned for GPUs.")
    world_size: int = option(1, f"{_NO_EFFECT} torchrun says it.")
    test_freq: int = option(1, "Epochs from one evaluation to the next.")
    full_crop: str = option(
        AUTO,
        "Evaluate on the whole height or width of the picture; false = on the middle 7/8 of it; auto = false, but "
        "true for published XCiTs with --eval, as their accuracies were measured.",
        choices=(AUTO, "true", "false"),
    )
    weights: str = option(
        "",
        "Weights to start from or to evaluate: published name, file or URL, of XCiT, DINO, timm or a run of this; "
        "empty = random. A head for other classes is replaced.",
    )
    pretrained: str = option("", "The same under the original's name.")
    checkpoint_key: str = option("teacher", "Which network of a full DINO checkpoint: teacher or student.")
    surgery: str = option("", "Take the patch embedding from these weights and hold it still; empty = off.")
    preset: str = option(
        "paper",
        "Defaults to start from; options given beside it win. "
        + "; ".join(f"{preset.name} = {preset.purpose}" for preset in PRESETS.values())
        + ".",
        choices=tuple(PRESETS),
    )
    as_stored: bool = option(
        False,
        "Read pictures exactly as XCiT's and DINO's scripts did: EXIF orientation, colour profiles, transparency and "
        "16 bits are ignored. false = they are honoured.",
    )


def preset_defaults(arguments: Sequence[str]) -> ClassifyOptions:
    """The defaults under the `--preset` that the arguments name."""
    name = "paper"
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--preset="):
            name = argument.partition("=")[2]
        elif argument == "--preset":
            name = following
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}")
    return replace(ClassifyOptions(), preset=name, **PRESETS[name].settings)


def check_classify_options(options: ClassifyOptions) -> None:
    """Refuse what cannot work before anything is opened or written.

    Raises:
        UserError: says which option, and what is allowed.
    """
    check_run_options(options)
    counts = ("batch_size", "epochs", "patch_size", "input_size", "test_freq", "recount")
    require_at_least(options, 1, *counts)
    not_negative = ("lr", "warmup_lr", "min_lr", "weight_decay", "clip_grad", "opt_eps", "mixup", "cutmix")
    require_at_least(options, 0, *not_negative, "color_jitter", "warmup_epochs", "distillation_tau")
    for name in ("drop", "drop_path", "model_ema_decay", "smoothing"):
        require(options, name, 0 <= getattr(options, name) < 1, "must lie in [0, 1)")
    for name in ("reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha"):
        require(options, name, 0 <= getattr(options, name) <= 1, "must lie in [0, 1]")
    require(options, "layer_decay", 0 < options.layer_decay <= 1, "must lie in (0, 1]")
    fits = options.warmup_epochs <= options.epochs
    require(options, "warmup_epochs", fits, f"must be at most --epochs ({options.epochs})")
    least, most = options.crop_scale
    require(options, "crop_scale", 0 < least <= most <= 1, "must be two rising numbers in (0, 1]")
    for name in ("cutmix_minmax", "lr_noise"):
        require(options, name, len(getattr(options, name)) in (0, 2), "must be two numbers, or left out")
    if options.distillation_type == "soft":
        require(options, "distillation_tau", options.distillation_tau > 0, "must be above 0")
    if mixes(options) and options.batch_size % 2 and not options.eval:
        raise UserError(f"mixup and CutMix take pairs: --batch_size must be even, got {options.batch_size}")
    if options.weights and options.pretrained and options.weights != options.pretrained:
        raise UserError("--weights and --pretrained are two names of one option: give one of them")
    if options.eval and not (options.weights or options.pretrained or options.resume):
        raise UserError("--eval needs weights: name them with --weights")


def mixes(options: ClassifyOptions) -> bool:
    """Whether pictures are mixed with each other."""
    return options.mixup > 0 or options.cutmix > 0 or bool(options.cutmix_minmax)
