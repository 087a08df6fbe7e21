"""Weight decay as the published detection and segmentation models have it."""

from typing import Any

from torch import nn


def groups_with_plain_norms(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters: without decay what has `norm` in its name, as layer norms do; batch norms have `bn`."""
    named = list(network.named_parameters())
    return [
        {"params": [value for name, value in named if "norm" not in name], "weight_decay": weight_decay},
        {"params": [value for name, value in named if "norm" in name], "weight_decay": 0.0},
    ]
