"""Settings to start from for classification, with their reasons. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ClassifyPreset:
    """Options that differ from the paper's.

    Attributes:
        purpose: when to take it, a few words.
        why: reasons, one sentence each; which numbers are measured and which are reasoned.
    """

    name: str
    purpose: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: tuple[str, ...] = ()


_FINE_TUNE: dict[str, Any] = {
    "epochs": 100,
    "lr": 5e-5,
    "warmup_epochs": 5,
    "min_lr": 1e-6,
    "repeated_aug": False,
}

PRESETS = {
    preset.name: preset
    for preset in (
        ClassifyPreset("paper", "XCiT from scratch on ImageNet, 8 GPUs x 128 pictures"),
        ClassifyPreset(
            "fine_tune",
            "from weights, to another large set",
            _FINE_TUNE,
            (
                "--lr 5e-5: a tenth of the paper's, which its authors give for fine-tuning",
                "--epochs 100, --repeated_aug false: reasoned, not measured",
            ),
        ),
        ClassifyPreset(
            "fine_tune_384",
            "from weights trained at 224 pixels, to pictures of 384",
            {
                **_FINE_TUNE,
                "input_size": 384,
                "epochs": 30,
                "weight_decay": 1e-8,
                "full_crop": "true",
            },
            (
                "--input_size 384: any size works, since positions are relative to the picture's sides",
                "--weight_decay 1e-8, --epochs 30: DeiT's for this step; XCiT's own were never published",
            ),
        ),
        ClassifyPreset(
            "small",
            "hundreds to thousands of pictures, from weights or from scratch, on a CPU too",
            {
                "epochs": 30,
                "batch_size": 32,
                "input_size": 96,
                "lr": 8e-3,
                "warmup_epochs": 3,
                "drop_path": 0.0,
                "mixup": 0.0,
                "cutmix": 0.0,
                "aa": "none",
                "color_jitter": 0.2,
                "reprob": 0.0,
                "repeated_aug": False,
                "crop_scale": (0.35, 1.0),
                "model_ema_decay": 0.99,
                "model_ema_warmup": True,
                "clip_grad": 1.0,
            },
            (
                "--lr 8e-3 for 512 pictures: 5e-4 for the 32 of a step",
                "--mixup 0, --cutmix 0, --aa none: they pay in runs of many epochs",
                "--model_ema_decay 0.99: an average over the paper's 25,000 steps would hardly leave its start",
            ),
        ),
    )
}
