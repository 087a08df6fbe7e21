"""The loss of classification: mixed or smoothed labels, and a teacher's outputs (DeiT, section 4; XCiT, section 4.1).

B = pictures, L = classes
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Distillation:
    """A teacher, and how much the student is to listen to it.

    Attributes:
        teacher: pictures to logits (B, L); in evaluation mode, without gradients.
        hard: learn the teacher's decision instead of its probabilities.
        alpha: share of the teacher in the loss.
        temperature: of both softmaxes, in soft distillation.
    """

    teacher: nn.Module
    hard: bool
    alpha: float = 0.5
    temperature: float = 1.0

    def term(self, logits_BL: Tensor, images: Tensor) -> Tensor:
        """What the student is to learn from the teacher, without `alpha`."""
        with torch.no_grad():
            taught_BL = self.teacher(images)
        return (
            hard_distillation(logits_BL, taught_BL)
            if self.hard
            else soft_distillation(logits_BL, taught_BL, self.temperature)
        )


def hard_distillation(logits_BL: Tensor, teacher_BL: Tensor) -> Tensor:
    """Cross-entropy with the teacher's decisions (DeiT, eq. 3)."""
    return F.cross_entropy(logits_BL.float(), teacher_BL.argmax(dim=1))


def soft_distillation(logits_BL: Tensor, teacher_BL: Tensor, temperature: float) -> Tensor:
    """KL divergence from the teacher's probabilities, times the squared temperature over B L, as in DeiT's code.

    Its equation 2 has no factor 1 / L, the published recipe has.
    """
    student = F.log_softmax(logits_BL.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_BL.float() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence * temperature**2 / logits_BL.numel()


@dataclass(frozen=True, eq=False)
class ClassificationLoss:
    """Network and a batch to its loss.

    Attributes:
        mixup: mixes pictures with their labels; None = off, and `smoothing` is then on the labels alone.
    """

    device: torch.device
    mixup: Mixup | None = None
    smoothing: float = 0.0
    distillation: Distillation | None = None

    def __call__(self, network: nn.Module, content: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Loss of images (B, 3, H, W) with labels (B,), on any device; draws from numpy's generator if it mixes."""
        images, labels = (part.to(self.device, non_blocking=True) for part in content)
        targets: Any = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        logits_BL = network(images)
        loss = self._labelled(logits_BL, targets)
        if self.distillation is None:
            return {"loss": loss}
        alpha = self.distillation.alpha
        return {
            "labels": (1 - alpha) * loss,
            "distillation": alpha * self.distillation.term(logits_BL, images),
        }

    def _labelled(self, logits_BL: Tensor, targets: Tensor) -> Tensor:
        # Mixed labels are probabilities (B, L), already smoothed.
        smoothing = 0.0 if targets.ndim == 2 else self.smoothing
        return F.cross_entropy(logits_BL.float(), targets, label_smoothing=smoothing)
