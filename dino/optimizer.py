"""Optimizers, their parameter groups, and what is done to gradients and rates at every step.

DINO, appendix: no weight decay on biases and one-dimensional parameters, gradients clipped one parameter at a
time, the last layer held still at first.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dino.runtime.options import UserError

OPTIMIZERS = ("adamw", "sgd", "lars")


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Two groups, in the order that checkpoints expect: decayed, then biases and one-dimensional ones."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (plain if is_plain(name, parameter) else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def is_plain(name: str, parameter: Tensor) -> bool:
    """Whether a parameter goes without weight decay."""
    return name.endswith(".bias") or parameter.ndim == 1


def create_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`adamw`, `sgd` (momentum 0.9) or `lars` (You et al. 2017); rates are set at every step."""
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if name == "lars":
        from timm.optim import Lars  # imported by this rare wish only: it takes as long as torch

        # As in the original, the rate follows the weights also while their decay is 0.
        adapted = [{**groups[0], "always_adapt": True}, *groups[1:]]
        return Lars(adapted, lr=0.0, momentum=0.9)
    raise UserError(f"unknown optimizer '{name}'; known: {', '.join(OPTIMIZERS)}")


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Learning rate for all, weight decay for the first group only."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of each parameter's gradient, float32 (parameters with a gradient,)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).float()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norms: Tensor, max_norm: float) -> None:
    """Scale each parameter's gradient to at most `max_norm` on its own (not the norm over all of them).

    Args:
        norms: from `gradient_norms` of the same parameters.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    if scales.device.type == "cpu":
        # To read a scale costs nothing here, to pass over a gradient does; on a GPU it is the other way round.
        long = [(gradient, s) for gradient, s in zip(gradients, scales.tolist(), strict=True) if s < 1.0]
        if long:
            torch._foreach_mul_([gradient for gradient, _ in long], [s for _, s in long])
    else:
        torch._foreach_mul_(gradients, list(scales.unbind()))
