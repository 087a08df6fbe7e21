"""Optimizer, learning rate by step, and moving average of a classification, all by timm."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from dino.downstream.classification.options import ClassifyOptions
from dino.runtime.options import UserError

BATCH_OF_LR = 512  # --lr is for so many pictures per step


def create_optimizer(
    options: ClassifyOptions, network: nn.Module, global_batch: int
) -> torch.optim.Optimizer:
    """timm's, with the learning rate for so many pictures per step.

    Raises:
        UserError: timm knows no such optimizer, or the network has no layers to tell apart.
    """
    tuned: dict[str, Any] = {}
    if options.opt_eps:
        tuned["eps"] = options.opt_eps
    if options.opt_betas:
        tuned["betas"] = options.opt_betas
    if "sgd" in options.opt.lower() or "momentum" in options.opt.lower():
        tuned.clear()  # it has neither
    if options.layer_decay < 1:
        tuned["layer_decay"] = options.layer_decay
    try:
        return create_optimizer_v2(
            network,
            opt=options.opt,
            lr=options.lr * global_batch / BATCH_OF_LR,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **tuned,
        )
    except (ValueError, AssertionError, TypeError, AttributeError) as error:
        raise UserError(f"--opt {options.opt} with these settings: {error}") from error


def create_scheduler(
    options: ClassifyOptions, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> Scheduler:
    """The learning rate by steps: linear warm-up, then as `--sched` says. The first step has the lowest rate."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=options.sched,
        num_epochs=options.epochs,
        decay_epochs=options.decay_epochs,
        decay_rate=options.decay_rate,
        min_lr=options.min_lr,
        warmup_lr=options.warmup_lr,
        warmup_epochs=options.warmup_epochs,
        noise=list(options.lr_noise) or None,
        noise_pct=options.lr_noise_pct,
        noise_std=options.lr_noise_std,
        noise_seed=options.seed,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def create_average(options: ClassifyOptions, network: nn.Module) -> ModelEmaV3 | None:
    """A moving average of the network's weights and statistics; None where none is asked for."""
    if not options.model_ema:
        return None
    device = torch.device("cpu") if options.model_ema_force_cpu else None
    return ModelEmaV3(
        network, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup, device=device
    )
