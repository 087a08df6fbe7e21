"""The teacher: its targets (centered or balanced, and sharpened) and how it follows the student.

DINO, section 3.1. Computing targets changes nothing; `Center.update` and `follow` do.

T = teacher's views, B = images, K = prototypes
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino.runtime.distributed import mean_over_ranks, world_size

_SINKHORN_ITERATIONS = 3


class Center(nn.Module):
    """Running mean of the teacher's logits, taken off before the softmax so that no prototype dominates (eq. 4).

    Its only state is the buffer `center` (1, K), under the name that published checkpoints have it.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    def targets(self, logits_TBK: Tensor, temperature: float) -> Tensor:
        """softmax((logits - center) / temperature), float32 (T, B, K)."""
        return ((logits_TBK.float() - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, logits_TBK: Tensor) -> None:
        """Move towards the mean over views, images and ranks. Call it after the targets were used."""
        batch_mean = mean_over_ranks(logits_TBK.float().mean(dim=(0, 1)))
        self.center.lerp_(batch_mean.unsqueeze(0), 1.0 - self.momentum)


@torch.no_grad()
def sinkhorn_knopp(logits_TBK: Tensor, temperature: float) -> Tensor:
    """Targets in which all prototypes are used equally over the batch of all ranks (SwAV, section 3; DINOv2).

    Returns:
        Float32 (T, B, K): every image's probabilities sum to 1, every prototype's to about T * B / K.
    """
    views, images, prototypes = logits_TBK.shape
    scores = logits_TBK.float().flatten(0, 1) / temperature
    # One shift for the whole matrix changes no ratio and keeps exp from overflowing.
    q = (scores - _over_ranks(scores.max(), dist.ReduceOp.MAX)).exp()
    samples = views * images * world_size()
    for _ in range(_SINKHORN_ITERATIONS):
        per_prototype = _over_ranks(q.sum(dim=0, keepdim=True), dist.ReduceOp.SUM)
        # A prototype that no image comes near underflows to 0 and stays unused, as it should.
        q = q / (per_prototype.clamp_min(torch.finfo(q.dtype).tiny) * prototypes)
        q = q / (q.sum(dim=1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny) * samples)
    return (q * samples).unflatten(0, (views, images))


def _over_ranks(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(value, op=operation)
    return value


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters only (Algorithm 1).

    Batch-norm statistics are not averaged: the teacher gathers its own from the global views.
    """
    followers: list[Tensor] = list(teacher.parameters())
    leaders = [parameter.detach() for parameter in student.parameters()]
    torch._foreach_lerp_(followers, leaders, 1.0 - momentum)
