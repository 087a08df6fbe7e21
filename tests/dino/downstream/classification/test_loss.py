import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from dino.downstream.classification.loss import (
    ClassificationLoss,
    Distillation,
    hard_distillation,
    soft_distillation,
)

CPU = torch.device("cpu")


@pytest.fixture
def logits():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.randn(
        4, 5, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_is_the_mean_divergence_of_each_entry(logits, temperature):
    student, teacher = logits
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = np.exp(np.array(t) / temperature) / np.exp(np.array(t) / temperature).sum()
        q = np.exp(np.array(s) / temperature) / np.exp(np.array(s) / temperature).sum()
        total += (p * np.log(p / q)).sum()
    expected = total * temperature**2 / student.numel()
    assert float(soft_distillation(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


def test_soft_distillation_of_the_teacher_itself_is_nothing(logits):
    assert float(soft_distillation(logits[0], logits[0], 2.0)) == pytest.approx(0, abs=1e-7)


def test_hard_distillation_takes_the_teachers_decision_for_the_label(logits):
    student, teacher = logits
    decisions = [int(np.argmax(row)) for row in teacher.tolist()]
    expected = -sum(F.log_softmax(student, 1)[n, label] for n, label in enumerate(decisions)) / 4
    assert float(hard_distillation(student, teacher)) == pytest.approx(float(expected), rel=1e-6)


class Constant(nn.Module):
    """The same logits for any picture, and what it was shown."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.logits * 1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_are_smoothed_as_timm_does(logits, smoothing):
    labels = torch.tensor([0, 4, 2, 2])
    found = ClassificationLoss(CPU, smoothing=smoothing)(
        Constant(logits[0]), (torch.zeros(4, 3, 8, 8), labels)
    )
    assert found.keys() == {"loss"}
    expected = LabelSmoothingCrossEntropy(smoothing)(logits[0], labels)
    assert float(found["loss"].detach()) == pytest.approx(float(expected), rel=1e-6)


def test_mixed_pictures_have_mixed_labels_and_the_teacher_sees_the_same_pictures(logits):
    images = torch.rand(4, 3, 8, 8)
    labels = torch.tensor([0, 4, 2, 1])
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=5)
    teacher, student = Constant(logits[1]), Constant(logits[0])
    loss = ClassificationLoss(CPU, mixup, 0.1, Distillation(teacher, hard=True, alpha=0.3))
    np.random.seed(0)
    found = loss(student, (images.clone(), labels))
    np.random.seed(0)
    mixed, targets = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.1, num_classes=5)(
        images.clone(), labels
    )
    assert torch.equal(student.seen[0], mixed) and torch.equal(teacher.seen[0], mixed)
    assert not torch.equal(mixed, images)
    expected = SoftTargetCrossEntropy()(logits[0], targets)
    assert float(found["labels"].detach()) == pytest.approx(0.7 * float(expected), rel=1e-6)
    assert float(found["distillation"].detach()) == pytest.approx(
        0.3 * float(hard_distillation(logits[0], logits[1])), rel=1e-6
    )


@pytest.mark.parametrize("hard", [True, False])
def test_the_student_gets_gradients_and_the_teacher_none(logits, hard):
    teacher, student = Constant(logits[1]), Constant(logits[0])
    loss = ClassificationLoss(CPU, distillation=Distillation(teacher, hard, 0.5, 2.0))
    found = loss(student, (torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])))
    sum(found.values()).backward()
    assert student.logits.grad.any() and teacher.logits.grad is None


def test_logits_of_half_precision_lose_nothing_more(logits):
    half = logits[0].to(torch.bfloat16)
    found = ClassificationLoss(CPU)(Constant(half), (torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])))
    assert found["loss"].dtype == torch.float32
