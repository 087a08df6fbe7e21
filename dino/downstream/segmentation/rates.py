"""Optimizer and learning rate of a segmentation network, those of the published models (XCiT, section 4.3)."""

import torch
from timm.scheduler import PolyLRScheduler
from torch import nn

from dino.downstream.segmentation.options import SegmentOptions
from dino.downstream.weight_decay import groups_with_plain_norms


def create_optimizer(options: SegmentOptions, network: nn.Module) -> torch.optim.AdamW:
    """AdamW without weight decay on what has `norm` in its name: layer norms, but not batch norms, called `bn`."""
    return torch.optim.AdamW(groups_with_plain_norms(network, options.weight_decay), lr=options.lr)


def create_scheduler(options: SegmentOptions, optimizer: torch.optim.Optimizer) -> PolyLRScheduler:
    """By steps: linear warm-up, then a polynomial down to the lowest rate."""
    return PolyLRScheduler(
        optimizer,
        t_initial=options.iterations,
        power=options.poly_power,
        lr_min=options.min_lr,
        warmup_t=options.warmup_iterations,
        warmup_lr_init=options.lr * options.warmup_ratio,
        t_in_epochs=False,
    )
