"""Optimizer and learning rates of detection, as the published models have them."""

import torch
from timm.scheduler import MultiStepLRScheduler
from torch import nn

from dino.downstream.detection.options import DetectOptions
from dino.downstream.length import Length
from dino.downstream.weight_decay import groups_with_plain_norms

_DECAY = 0.1  # of the rate at each of the schedule's epochs


def create_optimizer(options: DetectOptions, network: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW of all parameters."""
    return torch.optim.AdamW(
        groups_with_plain_norms(network, options.weight_decay),
        lr=options.lr,
        fused=device.type in ("cpu", "cuda"),
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
