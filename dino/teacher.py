"""The teacher: its targets (centered or balanced, and sharpened) and how it follows the student.

DINO, section 3.1. Computing targets changes nothing; `Center.update` and `follow` do.

T = teacher's views, B = images, b = some of them, K = prototypes
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino.loss import blocks
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

    @torch.no_grad()
    def targets(self, logits_TBK: Tensor, temperature: float) -> Tensor:
        """softmax((logits - center) / temperature), float32 (T, B, K)."""
        targets_TBK = torch.empty_like(logits_TBK, dtype=torch.float32)
        for t, some in blocks(logits_TBK):
            scaled_bK = (logits_TBK[t, some].float() - self.center).div_(temperature)
            torch.softmax(scaled_bK, dim=-1, out=targets_TBK[t, some])
        return targets_TBK

    @torch.no_grad()
    def update(self, logits_TBK: Tensor) -> None:
        """Move towards the mean over views, images and ranks. Call it after the targets were used.

        Args:
            logits_TBK: of the batch, or, with the same mean, (1, N, K) means over N equal parts of it.
        """
        batch_mean = mean_over_ranks(logits_TBK.float().mean(dim=(0, 1)))
        self.center.lerp_(batch_mean.unsqueeze(0), 1.0 - self.momentum)


@torch.no_grad()
def sinkhorn_knopp(logits_TBK: Tensor, temperature: float) -> Tensor:
    """Targets in which all prototypes are used equally over the batch of all ranks (SwAV, section 3; DINOv2).

    Returns:
        Float32 (T, B, K): every image's probabilities sum to 1, every prototype's to about T * B / K.
    """
    # In logarithms: logits over a temperature near 0.02 are too far apart for exp in float32, and an image all
    # of whose exponentials vanish would be left without a target.
    log_q = logits_TBK.float().flatten(0, 1) / temperature
    for _ in range(_SINKHORN_ITERATIONS):
        log_q.sub_(_logsumexp_over_ranks(log_q))
        log_q.sub_(log_q.logsumexp(dim=1, keepdim=True))
    return log_q.exp_().unflatten(0, logits_TBK.shape[:2])


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    """log of the sum of exp over the rows of all ranks, for each column."""
    total = values.logsumexp(dim=0)
    if world_size() == 1:
        return total
    largest = total.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    shares = (total - largest).exp()
    dist.all_reduce(shares)
    return largest + shares.log()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters only (Algorithm 1).

    Batch-norm statistics are not averaged: the teacher gathers its own from the global views.
    """
    followers: list[Tensor] = list(teacher.parameters())
    leaders = [parameter.detach() for parameter in student.parameters()]
    torch._foreach_lerp_(followers, leaders, 1.0 - momentum)
