"""Projection head: a three-layer MLP, an L2-normalised bottleneck, a weight-normalised layer of prototypes.

DINO, section 3.2 and appendix C. The names of the parameters are those of the published checkpoints.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()


class Prototypes(nn.Module):
    """Linear layer without bias whose rows have length `weight_g` and direction `weight_v`."""

    def __init__(self, in_dim: int, num_prototypes: int, *, learn_length: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=learn_length)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, features: Tensor) -> Tensor:
        # float32: these cosines are divided by temperatures near 0.04, which would magnify bf16's rounding.
        with _without_autocast(features.device.type):
            # Scaling the columns of the result spares a normalised copy of a very tall weight.
            scale = self.weight_g / self.weight_v.norm(dim=1, keepdim=True)
            return F.linear(features.to(self.weight_v.dtype), self.weight_v) * scale.T


class DinoHead(nn.Module):
    """Backbone features (n, in_dim) -> logits over prototypes (n, out_dim).

    Args:
        in_dim: width of the backbone's feature.
        out_dim: number of prototypes K.
        use_bn: batch norm after the hidden layers.
        norm_last_layer: keep the prototypes at length 1; learning it can be unstable.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of the normalised layer before the prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width_in in (in_dim, hidden_dim):
            layers.append(nn.Linear(width_in, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = Prototypes(bottleneck_dim, out_dim, learn_length=not norm_last_layer)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features).float(), dim=-1))
