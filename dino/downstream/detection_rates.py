"""Optimizer and learning rates of detection, as the published models have them."""

from typing import Any

import torch
from timm.scheduler import MultiStepLRScheduler
from torch import nn

from dino.downstream.detect_options import DetectOptions
from dino.downstream.length import Length

_DECAY = 0.1  # of the rate at each of the schedule's epochs


def create_optimizer(options: DetectOptions, network: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW of all parameters."""
    return torch.optim.AdamW(
        _groups(network, options.weight_decay), lr=options.lr, fused=device.type in ("cpu", "cuda")
    )


def create_scheduler(
    options: DetectOptions, optimizer: torch.optim.Optimizer, length: Length
) -> MultiStepLRScheduler:
    """Warm-up, and a tenth after each of the epochs of the schedule, step by step."""
    return MultiStepLRScheduler(
        optimizer,
        # timm counts a step as done when it begins.
        decay_t=[epoch * length.steps_per_round + 1 for epoch in options.length.decay_epochs],
        decay_rate=_DECAY,
        warmup_t=options.warmup_iterations,
        warmup_lr_init=options.lr * options.warmup_ratio,
        warmup_prefix=False,
        t_in_epochs=False,
    )


def _groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for all but what has `norm` in its name, as in the published models; batch norms have `bn`."""
    named = list(network.named_parameters())
    return [
        {"params": [value for name, value in named if "norm" not in name], "weight_decay": weight_decay},
        {"params": [value for name, value in named if "norm" in name], "weight_decay": 0.0},
    ]
