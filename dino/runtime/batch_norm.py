"""Batch norm over the pictures of all processes, on GPUs by torch's own layer, on CPUs, where that refuses, by ours."""

from typing import cast

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from dino.runtime.distributed import world_size


class _SumOverRanks(torch.autograd.Function):
    """The sum over all processes; so is its gradient, since every process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return cast(Tensor, _SumOverRanks.apply(gradient.contiguous()))


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` for processes on CPUs."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (N, C, ...) will do."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) normalised over all but C, in training by the mean and variance over all processes."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        others = [dim for dim in range(input.ndim) if dim != 1]
        per_channel = (1, -1, *[1] * (input.ndim - 2))
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = cast(Tensor, _SumOverRanks.apply(torch.cat([values.sum(others), count])))
        count = sums[-1].detach()
        mean_C = sums[:-1] / count
        centered = values - mean_C.view(per_channel)
        variance_C = cast(Tensor, _SumOverRanks.apply(centered.square().sum(others))) / count
        self._remember(mean_C, variance_C * count / (count - 1))
        scale_C = (variance_C + self.eps).rsqrt()
        if self.affine:
            scale_C = scale_C * self.weight
        output = centered * scale_C.view(per_channel)
        return (output + self.bias.view(per_channel) if self.affine else output).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), share)


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, whose batch norms, in training, then take statistics over the pictures of all processes.

    On CPUs a layer that is batch norm and more, as some of timm's are, keeps to the pictures of its own process.
    """
    if device.type == "cuda":
        return cast(nn.Module, convert_sync_batchnorm(network))
    for module in network.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = CpuSyncBatchNorm  # it differs in nothing but what it computes
    return network
