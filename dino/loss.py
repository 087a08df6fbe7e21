"""What the student minimises: cross-entropy with the teacher's targets, and KoLeo for small data.

V = student's views, T = teacher's views (the first T of the student's), B = images, K = prototypes, C = channels
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that are worked on together: on a CPU as many as its cache holds, on a GPU enough to keep it busy.
_BLOCK_ON_CPU = 2**18
_BLOCK = 2**24


def dino_loss(student_VBK: Tensor, targets_TBK: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's view and a different student's view (DINO, eq. 2, 3).

    Beside its inputs and the gradient it holds the probabilities of few pictures at a time.

    Args:
        student_VBK: the student's logits; its first T views are those that the teacher saw.
        targets_TBK: the teacher's probabilities; no gradient goes to them.
        temperature: of the student's softmax.

    Returns:
        A float32 scalar (float64 for float64 logits), ln K when the student's output is uniform. It can be
        differentiated once.

    Raises:
        ValueError: fewer than two views leave no pair of different ones.
    """
    if len(student_VBK) < 2:
        raise ValueError(f"the loss compares different views: at least 2 are needed, got {len(student_VBK)}")
    loss: Tensor = _CrossEntropy.apply(student_VBK, targets_TBK, temperature)
    return loss


class _CrossEntropy(torch.autograd.Function):
    """`dino_loss` block by block; the probabilities are computed again for the gradient, not kept."""

    @staticmethod
    def forward(ctx: Any, student_VBK: Tensor, targets_TBK: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student_VBK, targets_TBK)
        ctx.temperature = temperature
        total = torch.zeros((), dtype=_wide(student_VBK), device=student_VBK.device)
        for v, some in blocks(student_VBK):
            log_p_bK = F.log_softmax(student_VBK[v, some].to(total.dtype) / temperature, dim=-1)
            for target_bK in _of_other_views(targets_TBK[:, some], v):
                total -= (target_bK * log_p_bK).sum()
        return total / _terms(student_VBK, targets_TBK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        student_VBK, targets_TBK = ctx.saved_tensors
        # d/dx of -sum t ln softmax(x / temperature) = (sum(t) softmax(x / temperature) - t) / temperature
        weight = grad_output / (ctx.temperature * _terms(student_VBK, targets_TBK))
        mass_TB1 = targets_TBK.sum(dim=-1, keepdim=True) * weight
        grad_VBK = torch.empty_like(student_VBK)
        for v, some in blocks(student_VBK):
            scaled_bK = student_VBK[v, some].to(weight.dtype) / ctx.temperature
            grad_bK = grad_VBK[v, some]
            # Into its place at once: a second tensor of this size would be the largest thing held.
            wide_bK = grad_bK if grad_bK.dtype == weight.dtype else torch.empty_like(scaled_bK)
            torch.softmax(scaled_bK, dim=-1, out=wide_bK)
            wide_bK.mul_(sum(_of_other_views(mass_TB1[:, some], v)))
            for target_bK in _of_other_views(targets_TBK[:, some], v):
                wide_bK.addcmul_(target_bK, weight, value=-1)
            if wide_bK is not grad_bK:
                grad_bK.copy_(wide_bK)
        return grad_VBK, None, None


def blocks(logits_VBK: Tensor) -> Iterator[tuple[int, slice]]:
    """(view, some of the images), one after the other until all logits have had their turn."""
    views, images, prototypes = logits_VBK.shape
    at_once = max(1, (_BLOCK_ON_CPU if logits_VBK.device.type == "cpu" else _BLOCK) // max(1, prototypes))
    for view in range(views):
        for start in range(0, images, at_once):
            yield view, slice(start, start + at_once)


def _of_other_views(values_T: Tensor, view: int) -> list[Tensor]:
    return [value for t, value in enumerate(values_T) if t != view]


def _terms(student_VBK: Tensor, targets_TBK: Tensor) -> int:
    """Pairs of different views, times the images."""
    views, images, _ = student_VBK.shape
    return (len(targets_TBK) * views - min(len(targets_TBK), views)) * images


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def koleo_loss(features_BC: Tensor) -> Tensor:
    """Kozachenko-Leonenko regulariser: minus the mean log distance to the nearest other picture.

    Spreads the features over the sphere (Sablayrolles et al. 2019, eq. 3; DINOv2, section 4).

    Args:
        features_BC: features of different pictures, one view each; they are L2-normalised here.

    Returns:
        A float32 scalar; 0 for a single picture, which has no neighbour.
    """
    if len(features_BC) < 2:
        return features_BC.float().sum() * 0.0
    unit_BC = F.normalize(features_BC.float(), dim=-1)
    with torch.no_grad():
        similarity_BB = unit_BC @ unit_BC.T
        nearest_B = similarity_BB.fill_diagonal_(-torch.inf).argmax(dim=1)
    # The small constant keeps log and its gradient finite for identical pictures.
    distance_B = F.pairwise_distance(unit_BC, unit_BC[nearest_B], eps=1e-8)
    return -(distance_B + 1e-8).log().mean()
