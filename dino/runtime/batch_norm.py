"""Batch norm over the pictures of all processes, on GPUs by torch's own layer, on CPUs, where that refuses, by ours."""

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dino.runtime.distributed import world_size


class _Normalise(torch.autograd.Function):
    """(values - mean) / deviation * weight + bias, whose gradient passes through mean and variance too.

    C = channels; Ioffe and Szegedy, 2015, Algorithm 1 and section 3, with sums over all processes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        mean_C: Tensor,
        variance_C: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(values, weight_C, mean_C, (variance_C + eps).rsqrt(), count)
        return F.batch_norm(values, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        values, weight_C, mean_C, inverse_C, count = ctx.saved_tensors
        # The local sums of gradient * normalised values, and of gradient.
        _, for_weight_C, for_bias_C = torch.ops.aten.native_batch_norm_backward(
            *(gradient.contiguous(), values, weight_C, None, None, mean_C, inverse_C),
            *(True, 0.0, [False, True, True]),
        )
        sums_2C = torch.cat([for_weight_C, for_bias_C])
        dist.all_reduce(sums_2C)
        of_normalised_C, of_gradient_C = (sums_2C / count).chunk(2)
        # weight / deviation * (gradient - its mean - normalised values * their mean product with the gradient)
        scale_C = weight_C * inverse_C
        slope_C = -scale_C * inverse_C * of_normalised_C
        shift_C = -scale_C * of_gradient_C - slope_C * mean_C
        per_channel = (1, -1, *[1] * (values.ndim - 2))
        scale, slope, shift = (each_C.view(per_channel) for each_C in (scale_C, slope_C, shift_C))
        for_values = torch.addcmul(shift, values, slope).addcmul_(gradient, scale)
        return for_values, for_weight_C, for_bias_C, None, None, None, None


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` for processes on CPUs."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (N, C, ...) will do."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) normalised over all but C, in training by the mean and variance over all processes."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        mean_C, variance_C, count = _statistics(values.detach())
        self._remember(mean_C, variance_C * count / (count - 1))
        weight_C, bias_C = self.weight, self.bias
        if weight_C is None:
            weight_C, bias_C = torch.ones_like(mean_C), torch.zeros_like(mean_C)
        normalised = _Normalise.apply(values, weight_C, bias_C, mean_C, variance_C, count, self.eps)
        return cast(Tensor, normalised).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), share)


def _statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance (both (C,)) and count of the values of each channel, over all processes."""
    # Batch norm's own kernel, which updates nothing here; on CPUs many times faster than torch.var_mean.
    mean_C, variance_C = torch.batch_norm_update_stats(values, None, None, 0.0)
    own = torch.cat([mean_C, variance_C, mean_C.new_tensor([values.numel() / values.shape[1]])])
    of_rank = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(of_rank, own)
    channels = len(mean_C)
    means_RC, variances_RC, counts_R1 = torch.stack(of_rank).split([channels, channels, 1], dim=1)
    count = counts_R1.sum()
    mean_C = (counts_R1 * means_RC).sum(dim=0) / count
    # Within the ranks and between them: no difference of large numbers, as of the mean square and the squared mean.
    variance_C = (counts_R1 * (variances_RC + (means_RC - mean_C).square())).sum(dim=0) / count
    return mean_C, variance_C, count


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, whose batch norms, in training, then take statistics over the pictures of all processes.

    On CPUs a layer that is batch norm and more, as some of timm's are, keeps to the pictures of its own process.
    """
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # takes seconds, and most runs are of one process

        return cast(nn.Module, convert_sync_batchnorm(network))
    for module in network.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = CpuSyncBatchNorm  # it differs in nothing but what it computes
    return network
