"""The options of detection; the defaults are those of the published models. Imports no torch."""

from dataclasses import dataclass
from typing import NamedTuple

from dino.downstream.run_options import RunOptions, check_run_options, require, require_at_least
from dino.runtime.options import AUTO, UserError, option

DEFAULT_ARCH = "xcit_small_12_p16"
PUBLISHED_SIDES = (800, 1333)  # short and long side in pixels

# Stochastic depth of the published models, by the size in their names; 0 for the smaller ones.
_DROP_PATH = {"small_12": 0.05, "small_24": 0.1, "medium_24": 0.15, "large_24": 0.15}


class Schedule(NamedTuple):
    """Epochs of a run, and those after which the rate falls to a tenth."""

    epochs: int
    decay_epochs: tuple[int, ...]


SCHEDULES = {"1x": Schedule(12, (8, 11)), "3x": Schedule(36, (27, 33))}


@dataclass(frozen=True)
class DetectOptions(RunOptions):
    data_path: str = option("", "Folder of the pictures to train on.")
    annotations: str = option("", "COCO file (.json) of what is in them.")
    val_data_path: str = option("", "Folder of the pictures to evaluate on; empty = that of --data_path.")
    val_annotations: str = option(
        "", "COCO file of what is in them; empty = evaluate on what is trained on, such as for a trial."
    )
    max_pictures: int = option(0, "Train on the first so many pictures alone, by their ids; 0 = on all.")
    keep_empty: bool = option(False, "Train on pictures without objects too.")
    eval: bool = option(False, "Only score the weights, on the pictures to evaluate on.")
    input: tuple[str, ...] = option(
        (), "Only draw the objects in these pictures: files, folders, patterns. Empty = train or score."
    )

    weights: str = option(
        "",
        "Weights to start from, to score or to draw with: a backbone's (published name, file or URL), or a whole "
        "detector's, of mmdetection or of a run of this. Empty = random; with --eval and --input, best_model.pth of "
        "--output_dir.",
    )
    checkpoint_key: str = option("teacher", "Which network of a full DINO checkpoint: teacher or student.")
    arch: str = option(
        AUTO,
        "Backbone: an XCiT name; auto = what the weights are for, else xcit_small_12_p16.",
        aliases=("model",),
    )
    drop_path: float = option(
        -1.0, "Stochastic depth, in [0, 1); 0 = off; -1 = that of the published model of this size."
    )
    regions: int = option(512, "Regions of a picture that the boxes are trained on; fewer for CPUs.")

    short_sides: tuple[int, ...] = option(
        tuple(range(480, 801, 32)), "Short sides in pixels, of which each training picture gets one."
    )
    long_side: int = option(1333, "Longest side of training pictures in pixels.")
    cut_share: float = option(
        0.5, "Part of the training pictures that are cut out before, in [0, 1]; 0 = off."
    )
    cut_from: tuple[int, ...] = option((400, 500, 600), "Short sides in pixels of what they are cut from.")
    cut_sides: tuple[int, int] = option((384, 600), "Shortest and longest side of a cut in pixels.")
    flip: bool = option(True, "Mirror every second training picture.")
    test_sides: tuple[int, ...] = option(
        (),
        "Short side in pixels that pictures are resized to for scoring and drawing, and the longest for the other "
        "one; empty = what the weights were trained for, else 800 1333.",
    )

    batch_size: int = option(16, "Pictures of a step, over all processes.")
    schedule: str = option(
        "1x",
        "1x = 12 epochs, and a tenth of the rate after 8 and 11; 3x = 36, after 27 and 33, as published.",
        choices=tuple(SCHEDULES),
    )
    epochs: int = option(0, "Epochs; 0 = those of --schedule.")
    decay_epochs: tuple[int, ...] = option(
        (),
        "Epochs after which the rate falls to a tenth; empty = at the same parts of the run as in --schedule.",
    )
    lr: float = option(1e-4, "Peak learning rate.")
    weight_decay: float = option(0.05, "Weight decay; none on norms.")
    warmup_iterations: int = option(500, "Steps of linear warm-up of the rate; 0 = none.")
    warmup_ratio: float = option(0.001, "Share of the peak rate that warm-up begins with.")
    clip_grad: float = option(0.0, "Longest gradient, over all parameters (L2 norm); 0 = no clipping.")
    val_every: int = option(1, "Epochs from one evaluation to the next.")
    resume: str = option("", "Checkpoint to go on from where --output_dir has none.")

    score_threshold: float = option(0.05, "Least certainty of what is detected and scored, in [0, 1].")
    draw_threshold: float = option(0.5, "Least certainty of what is drawn, in [0, 1].")
    opacity: float = option(0.45, "Of the masks over the picture, in [0, 1].")

    @property
    def length(self) -> Schedule:
        """Epochs and decays that are asked for."""
        chosen = SCHEDULES[self.schedule]
        epochs = self.epochs or chosen.epochs
        decays = tuple(max(round(each * epochs / chosen.epochs), 1) for each in chosen.decay_epochs)
        return Schedule(epochs, tuple(sorted(self.decay_epochs)) or decays)


def published_drop_path(arch: str) -> float:
    """Stochastic depth that the published model of an architecture was trained with."""
    return next((rate for size, rate in _DROP_PATH.items() if f"_{size}_" in arch), 0.0)


def chosen_sides(sides: tuple[int, ...], trained: tuple[int, int] | None) -> tuple[int, int]:
    """Short and long side in pixels for scoring and drawing.

    Args:
        sides: the option.
        trained: what the weights were trained for; None where that is not known.
    """
    if sides:
        return min(sides), max(sides)
    return trained or PUBLISHED_SIDES


def check_detect_options(options: DetectOptions) -> None:
    """Refuse what cannot work before anything is opened or written.

    Raises:
        UserError: says which option, and what is allowed.
    """
    check_run_options(options)
    require_at_least(options, 1, "batch_size", "val_every", "long_side", "regions")
    not_negative = ("lr", "weight_decay", "warmup_iterations", "clip_grad", "epochs", "max_pictures")
    require_at_least(options, 0, *not_negative)
    for name in ("opacity", "score_threshold", "draw_threshold", "cut_share", "warmup_ratio"):
        require(options, name, 0 <= getattr(options, name) <= 1, "must lie in [0, 1]")
    drop_path = options.drop_path
    require(options, "drop_path", drop_path == -1 or 0 <= drop_path < 1, "must lie in [0, 1), or be -1")
    for name in ("short_sides", "cut_from"):
        sides = getattr(options, name)
        require(options, name, min(sides, default=0) >= 1, "must be one side of 1 or more, or several")
    least, greatest = options.cut_sides
    require(options, "cut_sides", 1 <= least <= greatest, "must be two rising sides of 1 or more")
    sides = options.test_sides
    fine = len(sides) in (0, 2) and min(sides, default=1) >= 1
    require(options, "test_sides", fine, "must be two sides of 1 or more, or left out")
    require(
        options, "decay_epochs", min(options.decay_epochs, default=1) >= 1, "must be numbers of 1 or more"
    )
    _check_data(options)


def _check_data(options: DetectOptions) -> None:
    if options.eval and options.input:
        raise UserError("--eval scores and --input draws: ask for one of them")
    if options.input:
        return
    scored = options.eval and options.val_annotations
    if not options.annotations and not scored:
        raise UserError("--annotations is missing: the COCO file of the pictures (--input draws without it)")
    if not options.data_path and not (scored and options.val_data_path):
        raise UserError("--data_path is missing: the folder of pictures (--input draws without it)")
