"""The options of semantic segmentation; the defaults are those of the published models. Imports no torch."""

from dataclasses import dataclass

from dino.downstream.run_options import RunOptions, check_run_options, require, require_at_least
from dino.runtime.options import AUTO, UserError, option

PUBLISHED_SCALE = (2048, 512)
DEFAULT_ARCH = "xcit_small_12_p16"

_FINEST, _COARSEST = 4, 32  # strides of the maps, in pixels

# Stochastic depth of the published models, by the size in their names; 0 for the smaller ones.
_DROP_PATH = {"small_12": 0.05, "small_24": 0.1, "medium_24": 0.2, "large_24": 0.2}
_DROP_PATH_UPERNET = {**_DROP_PATH, "medium_24": 0.15, "large_24": 0.15}


@dataclass(frozen=True)
class SegmentOptions(RunOptions):
    data_path: str = option(
        "",
        "Folder of images/train, images/val and masks/ (or annotations/, labels/) with the same names; a pixel of a "
        "mask is the number of its class. Or ADE20k's folder.",
    )
    eval: bool = option(False, "Only score the weights on val.")
    input: tuple[str, ...] = option(
        (), "Only draw the classes of these pictures: files, folders, patterns. Empty = train or score."
    )

    weights: str = option(
        "",
        "Weights to start from, to score or to draw with: a backbone's (published name, file or URL), or a whole "
        "segmentation network's, of mmsegmentation or of a run of this, with a new last layer for other classes. "
        "Empty = random; with --eval and --input, best_model.pth of --output_dir.",
    )
    checkpoint_key: str = option("teacher", "Which network of a full DINO checkpoint: teacher or student.")
    arch: str = option(
        AUTO,
        "Backbone: an XCiT name; auto = what the weights are for, else xcit_small_12_p16.",
        aliases=("model",),
    )
    head: str = option(
        AUTO,
        "fpn = Semantic FPN; upernet = UPerNet; auto = what the weights are for, else fpn.",
        choices=(AUTO, "fpn", "upernet"),
    )
    drop_path: float = option(
        -1.0, "Stochastic depth, in [0, 1); 0 = off; -1 = that of the published model of this size."
    )

    ignore: tuple[int, ...] = option((255,), "Numbers in masks that are no class, such as 11 255.")
    num_classes: int = option(
        0, "Classes; 0 = those in classes.txt of --data_path (id, tab, name), else as many as the masks hold."
    )
    reduce_zero_label: str = option(
        AUTO,
        "Take 0 for no class, and begin the classes with 1; auto = in ADE20k's folder.",
        choices=(AUTO, "true", "false"),
    )
    check_masks: bool = option(
        True,
        "Look through all masks at the start, and refuse what does not fit; false = as their turn comes.",
    )

    scale: tuple[int, ...] = option(
        (),
        "Longest and shortest side in pixels that pictures are fitted into, before the random factor of training; 0 "
        "= their own size; empty = what the weights were trained with, else 2048 512.",
    )
    ratios: tuple[float, float] = option((0.5, 2.0), "Least and largest random factor in training.")
    crop: int = option(
        512, "Side in pixels of the training crops, and of the windows of --mode slide; a multiple of 32."
    )
    cat_max_ratio: float = option(
        0.75, "Draw a crop again, up to ten times, while one class fills more of it; 1 = off."
    )
    flip: bool = option(True, "Mirror every second crop.")
    photometric: bool = option(True, "Change brightness, contrast, saturation and hue of crops.")

    batch_size: int = option(16, "Pictures of a step, over all processes.")
    iterations: int = option(80_000, "Steps; the published UPerNets have 160000.")
    lr: float = option(6e-5, "Peak learning rate.")
    min_lr: float = option(0.0, "Learning rate at the end.")
    weight_decay: float = option(0.01, "Weight decay; none on norms.")
    poly_power: float = option(1.0, "Power of the polynomial by which the rate falls; 1 = linearly.")
    warmup_iterations: int = option(1500, "Steps of linear warm-up of the rate; 0 = none.")
    warmup_ratio: float = option(1e-6, "Share of the peak rate that warm-up begins with.")
    clip_grad: float = option(0.0, "Longest gradient, over all parameters (L2 norm); 0 = no clipping.")
    val_every: int = option(8000, "Steps from one evaluation to the next.")
    resume: str = option("", "Checkpoint to go on from where --output_dir has none.")

    mode: str = option(
        "whole",
        "Score and draw a picture at once, or in windows of --crop that slide over it, for large ones.",
        choices=("whole", "slide"),
    )
    stride: int = option(0, "Pixels from one window to the next, a multiple of 4; 0 = two thirds of --crop.")
    opacity: float = option(0.55, "Of the colours over the picture, in [0, 1].")
    legend: bool = option(True, "Draw the classes' names beside the picture.")

    @property
    def windows(self) -> tuple[int, int]:
        """Side of the sliding windows and their stride, in pixels; 0 and 0 = the whole picture at once."""
        if self.mode == "whole":
            return 0, 0
        return self.crop, self.stride or max(2 * self.crop // 3 // _FINEST * _FINEST, _FINEST)

    @property
    def reduces_zero_label(self) -> bool | None:
        """None: as the layout of the data says."""
        return None if self.reduce_zero_label == AUTO else self.reduce_zero_label == "true"


def published_drop_path(arch: str, head: str) -> float:
    """Stochastic depth that the published model of an architecture was trained with."""
    rates = _DROP_PATH_UPERNET if head == "upernet" else _DROP_PATH
    return next((rate for size, rate in rates.items() if f"_{size}_" in arch), 0.0)


def chosen_scale(scale: tuple[int, ...], trained: tuple[int, ...] | None) -> tuple[int, int] | None:
    """(long, short) sides in pixels; None = a picture's own size.

    Args:
        scale: the option.
        trained: what the weights were trained with, in the option's terms; None where that is not known.
    """
    sides = scale or (PUBLISHED_SCALE if trained is None else trained)
    return None if len(sides) == 1 else (max(sides), min(sides))


def check_segment_options(options: SegmentOptions) -> None:
    """Refuse what cannot work before anything is opened or written.

    Raises:
        UserError: says which option, and what is allowed.
    """
    check_run_options(options)
    require_at_least(options, 1, "batch_size", "iterations", "val_every", "crop")
    not_negative = ("lr", "min_lr", "weight_decay", "poly_power", "warmup_iterations", "clip_grad")
    require_at_least(options, 0, *not_negative, "num_classes", "stride")
    for name in ("opacity", "warmup_ratio", "cat_max_ratio"):
        require(options, name, 0 <= getattr(options, name) <= 1, "must lie in [0, 1]")
    drop_path = options.drop_path
    require(options, "drop_path", drop_path == -1 or 0 <= drop_path < 1, "must lie in [0, 1), or be -1")
    require(
        options, "ratios", 0 < options.ratios[0] <= options.ratios[1], "must be two rising numbers above 0"
    )
    require(options, "crop", options.crop % _COARSEST == 0, f"must be a multiple of {_COARSEST}")
    require(options, "stride", options.stride % _FINEST == 0, f"must be a multiple of {_FINEST}")
    require(options, "stride", options.stride <= options.crop, f"must be at most --crop ({options.crop})")
    require(options, "ignore", min(options.ignore, default=0) >= 0, "must be numbers of 0 or more")
    sides = options.scale
    fine = (len(sides) in (0, 2) and min(sides, default=1) >= 1) or sides == (0,)
    require(options, "scale", fine, "must be two sides of 1 or more, or 0, or left out")
    if options.eval and options.input:
        raise UserError("--eval scores and --input draws: ask for one of them")
    if not options.input and not options.data_path:
        raise UserError("--data_path is missing: the folder of pictures and masks (--input draws without it)")
    trains = not options.eval and not options.input
    fits = options.warmup_iterations < options.iterations
    require(
        options, "warmup_iterations", fits or not trains, f"must be below --iterations ({options.iterations})"
    )
