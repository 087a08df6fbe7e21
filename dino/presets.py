"""Named sets of defaults for a pre-training run, each setting with its reason. Data only: imports nothing of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """Settings, by the names of their options, that share a reason."""

    settings: Mapping[str, Any]
    why: str


@dataclass(frozen=True)
class Preset:
    """Defaults for one purpose.

    Attributes:
        purpose: for how many pictures, on what hardware.
        status: where the numbers come from: measured by us, published by others, or reasoned.
    """

    name: str
    purpose: str
    status: str
    groups: tuple[Group, ...]

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for group in self.groups for name, value in group.settings.items()}


_REASONED = "reasoned, not measured"

_PAPER = Preset("paper", "DINO's own defaults", "published", ())

_TINY = Preset(
    "tiny",
    "thousands of pictures, minutes on a CPU",
    "measured: benchmarks/results/learning_demo.json, learning_photos.json",
    (
        Group(
            {
                "arch": "xcit_pico_3_p8",
                "head_hidden_dim": 512,
                "bottleneck_dim": 128,
                "global_crops_size": 48,
                "local_crops_size": 24,
                "local_crops_number": 4,
                "batch_size_per_gpu": 32,
                "eval_size": 64,
            },
            "small enough for a CPU",
        ),
        Group(
            {"global_crops_scale": (0.5, 1.0), "local_crops_scale": (0.1, 0.5), "blur": 0.0},
            "views that still show something at this size",
        ),
        Group(
            {"color_jitter": (0.4, 0.4, 0.8, 0.5), "grayscale": 0.4},
            "colours that cannot be relied on, else telling few pictures apart by them is all that is learned",
        ),
        Group(
            {"out_dim": 128, "centering": "sinkhorn_knopp"},
            "few prototypes in equal use; with more, under centering, short runs learned next to nothing",
        ),
        Group(
            {"teacher_temp": 0.02, "warmup_teacher_temp": 0.02},
            "sharp targets, since equal use makes them soft",
        ),
        Group({"koleo_weight": 0.05}, "features kept apart"),
        Group({"momentum_teacher": 0.99}, "a teacher that follows within few steps"),
        Group(
            {"lr": 0.024, "warmup_epochs": 2}, "few steps, and a rate that is scaled down to the small batch"
        ),
        Group({"weight_decay_end": 0.04, "drop_path_rate": 0.0}, "a network too small to need restraint"),
        Group(
            {"epochs": 8, "freeze_last_layer": 0, "knn_freq": 4},
            "no epoch to spare for prototypes that are held",
        ),
    ),
)

_SMALL = Preset(
    "small",
    "10,000 to 100,000 pictures, one GPU of 24 GB",
    _REASONED,
    (
        Group(
            {"arch": "xcit_tiny_12_p16", "batch_size_per_gpu": 128},
            "a quarter of XCiT-S's parameters for a tenth of ImageNet or less; about 13 GiB, so one GPU holds it",
        ),
        Group(
            {"out_dim": 4096},
            "fewer prototypes for fewer pictures",
        ),
        Group(
            {"centering": "sinkhorn_knopp", "koleo_weight": 0.05},
            "prototypes in equal use, features kept apart; from tiny, which was measured as a whole",
        ),
        Group(
            {"epochs": 300},
            "as VISSL does on ImageNet; epochs have fewer steps here, and many of them are cheap",
        ),
        Group({"drop_path_rate": 0.05}, "as published for XCiT-S; larger ones are for larger models"),
    ),
)

_MEDIUM = Preset(
    "medium",
    "100,000 to a million pictures, 4 GPUs of 24 GB",
    _REASONED,
    (
        Group(
            {"arch": "xcit_small_12_p16", "batch_size_per_gpu": 64},
            "256 pictures a step on 4 GPUs, on one with --accumulate 4",
        ),
        Group({"out_dim": 16384}, "between small's prototypes and ImageNet's"),
        Group(
            {"epochs": 300, "lr": 2.5e-4, "min_lr": 1e-5, "drop_path_rate": 0.05},
            "as published for this model; the last rate is a quarter, as is the batch",
        ),
        Group(
            {"global_crops_scale": (0.3, 1.0), "local_crops_scale": (0.05, 0.3)},
            "as published for this model",
        ),
        Group(
            {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30},
            "DINO's way for long runs; without its free length of the prototypes, which can be unstable",
        ),
    ),
)

_CONTINUE = Preset(
    "continue",
    "from good weights (--init_from) on pictures of one's own, without losing what they know",
    _REASONED,
    (
        Group(
            {"lr": 5e-5, "warmup_epochs": 2},
            "a tenth of DINO's rate, since a high one starts over",
        ),
        Group({"epochs": 20}, "short, since users report that longer runs lose what was there"),
        Group(
            {"momentum_teacher": 0.999},
            "the teacher, whose features are kept, leaves its start slowly; where there are fewer than a thousand "
            "steps, give 0.996",
        ),
        Group(
            {"out_dim": 4096, "freeze_last_layer": 2},
            "the head is new, few prototypes settle soon, and they are held while the rate warms up",
        ),
        Group(
            {"teacher_temp": 0.04, "warmup_teacher_temp": 0.04},
            "sharp throughout, since the soft targets of a new head are nearly uniform",
        ),
        Group({"clip_grad": 1.0}, "the new head's first gradients must not shake the backbone"),
        Group({"weight_decay_end": 0.04}, "a rising decay would shrink weights that are good"),
        Group({"knn_freq": 1}, "k-NN accuracy is compared with the first after every epoch, see --knn_drop"),
    ),
)


@dataclass(frozen=True)
class _Recipe:
    """What tells the published recipes from each other."""

    gpus: int
    batch_size_per_gpu: int
    drop_path_rate: float
    min_lr: float
    local_crops_number: int
    # Least share of the picture in a global view, most in a local one.
    crops_scale: float


_RECIPES = {
    "xcit_small_12_p16": _Recipe(16, 64, 0.05, 4e-5, 8, 0.3),
    "xcit_small_12_p8": _Recipe(32, 32, 0.05, 1e-5, 6, 0.32),
    "xcit_medium_24_p16": _Recipe(32, 32, 0.15, 1e-5, 8, 0.3),
    "xcit_medium_24_p8": _Recipe(96, 10, 0.15, 1e-5, 6, 0.32),
    "xcit_large_24_p16": _Recipe(80, 14, 0.3, 1e-5, 8, 0.32),
    "xcit_large_24_p8": _Recipe(128, 4, 0.3, 1e-5, 8, 0.32),
}
_RECIPE_LR = 2.5e-4
_VISSL = "published: VISSL's configuration"


def _recipe_groups(arch: str, recipe: _Recipe, gpus: int, batch_size_per_gpu: int) -> tuple[Group, ...]:
    total = gpus * batch_size_per_gpu
    return (
        Group(
            {"arch": arch, "batch_size_per_gpu": batch_size_per_gpu},
            f"{total:,} pictures a step on {gpus} GPUs; on fewer, --accumulate makes up for them",
        ),
        Group(
            {"epochs": 300, "lr": _RECIPE_LR, "min_lr": recipe.min_lr},
            f"the rate is for 256 pictures, {_RECIPE_LR * total / 256:.3g} for {total:,}; VISSL's warm-up "
            "starts at --min_lr, ours at 0",
        ),
        Group(
            {
                "norm_last_layer": False,
                "teacher_temp": 0.07,
                "warmup_teacher_temp": 0.04,
                "warmup_teacher_temp_epochs": 30,
            },
            "DINO's way to better features in long runs",
        ),
        Group({"drop_path_rate": recipe.drop_path_rate}, "grows with the model"),
        Group(
            {
                "global_crops_scale": (recipe.crops_scale, 1.0),
                "local_crops_scale": (0.05, recipe.crops_scale),
                "local_crops_number": recipe.local_crops_number,
            },
            "views of the recipe",
        ),
        Group(
            {
                "out_dim": 65536,
                "momentum_teacher": 0.996,
                "weight_decay": 0.04,
                "weight_decay_end": 0.4,
                "warmup_epochs": 10,
                "freeze_last_layer": 1,
            },
            "as in the paper",
        ),
    )


def _model_preset(arch: str, recipe: _Recipe, status: str) -> Preset:
    gpus, batch = recipe.gpus, recipe.batch_size_per_gpu
    return Preset(
        arch,
        f"its recipe for ImageNet, {gpus} GPUs x {batch} pictures",
        status,
        _recipe_groups(arch, recipe, gpus, batch),
    )


_STATUS = {
    "xcit_small_12_p16": f"{_VISSL}, 74.8 % k-NN there after 250 epochs",
    "xcit_small_12_p8": "reasoned: no configuration is public; medium_24_p8's views, small_12_p16's drop path",
}

# Of the recipes whose accuracy is published, the one that a single machine can follow.
_IMAGENET = Preset(
    "imagenet",
    "1.28 million pictures, 8 GPUs of 40 GB",
    f"the recipe of xcit_small_12_p16 on one machine; {_STATUS['xcit_small_12_p16']}",
    _recipe_groups("xcit_small_12_p16", _RECIPES["xcit_small_12_p16"], gpus=8, batch_size_per_gpu=128),
)

_BY_PURPOSE = (_PAPER, _TINY, _SMALL, _MEDIUM, _IMAGENET, _CONTINUE)
_BY_MODEL = tuple(_model_preset(arch, recipe, _STATUS.get(arch, _VISSL)) for arch, recipe in _RECIPES.items())

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*_BY_PURPOSE, *_BY_MODEL)}

PURPOSES = "; ".join(
    [*(f"{preset.name}: {preset.purpose}" for preset in _BY_PURPOSE), "a model: its recipe for ImageNet"]
)
