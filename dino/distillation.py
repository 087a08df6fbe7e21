"""Self-distillation with no labels: student, teacher and one step of DINO's Algorithm 1.

T = teacher's views, V = student's views, B = images, K = prototypes
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino.collapse import feature_measures, output_measures
from dino.loss import dino_loss, koleo_loss
from dino.network import MultiCropNetwork, Output
from dino.optimizer import (
    cancel_last_layer_gradients,
    clip_gradients,
    create_optimizer,
    gradient_norms,
    parameter_groups,
    set_rates,
)
from dino.runtime.distributed import autocast, mean_over_ranks, world_size
from dino.teacher import Center, follow, sinkhorn_knopp

GLOBAL_VIEWS = 2


class Rates(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    hold_last_layer: bool


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        measures: means over the ranks: `loss`, and those of `dino.collapse`.
        finite: false when the step was skipped, on all ranks, for a loss or gradient that is not a number.
    """

    measures: dict[str, float]
    finite: bool


class SelfDistillation:
    """A student, the teacher that follows it, and everything that changes with a step.

    Args:
        student, teacher: networks of equal weights, on their device; the teacher has no drop path.
        num_prototypes: width of their output.
        optimizer: `adamw`, `sgd` or `lars`.
        student_temperature: of the student's softmax.
        clip_grad: longest gradient of a parameter; 0 = no clipping.
        centering: `center` (the paper's) or `sinkhorn_knopp` (DINOv2's).
        koleo_weight: weight of the KoLeo loss on the student's global views; 0 = off.
        precision: of the forward pass, `fp32`, `bf16` or `fp16`.
    """

    def __init__(
        self,
        student: MultiCropNetwork,
        teacher: MultiCropNetwork,
        *,
        num_prototypes: int,
        optimizer: str = "adamw",
        student_temperature: float = 0.1,
        clip_grad: float = 3.0,
        centering: str = "center",
        koleo_weight: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        shared = {t.data_ptr() for t in student.parameters()} & {t.data_ptr() for t in teacher.parameters()}
        assert not shared, "student and teacher share weights: the teacher would not lag behind"
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.device = next(student.parameters()).device
        self.center = Center(num_prototypes).to(self.device)
        self.optimizer = create_optimizer(optimizer, parameter_groups(student))
        self.student_temperature = student_temperature
        self.clip_grad = clip_grad
        self.centering = centering
        self.koleo_weight = koleo_weight
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._statistics = [buffer for network in (student, teacher) for buffer in network.buffers()]
        self._parallel_student = _in_parallel(student)

    def step(self, views: Sequence[Tensor], rates: Rates) -> StepResult:
        """Algorithm 1 for one batch of views (B, 3, H, W), the two global ones first."""
        statistics = [buffer.clone() for buffer in self._statistics]
        set_rates(self.optimizer, rates.lr, rates.weight_decay)

        with autocast(self.device, self.precision):
            with torch.no_grad():
                taught: Output = self.teacher(views[:GLOBAL_VIEWS])
            learned: Output = self._parallel_student(views)

        targets_TBK = self.targets(taught.logits_VBK, rates.teacher_temperature)
        cross_entropy = dino_loss(learned.logits_VBK, targets_TBK, self.student_temperature)
        loss = cross_entropy + self._koleo(learned)
        measures = self._measures(loss, cross_entropy, targets_TBK, taught)

        finite = self._update_student(loss, measures["loss"], rates.hold_last_layer)
        if finite:
            follow(self.teacher, self.student, rates.momentum)
            self.center.update(taught.logits_VBK)
        else:
            for buffer, before in zip(self._statistics, statistics, strict=True):
                buffer.copy_(before)
        return StepResult(measures, finite)

    def targets(self, logits_TBK: Tensor, temperature: float) -> Tensor:
        """The teacher's probabilities, centered or balanced, and sharpened."""
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits_TBK, temperature)
        return self.center.targets(logits_TBK, temperature)

    def _koleo(self, learned: Output) -> Tensor:
        if not self.koleo_weight:
            return learned.features_VBC.new_zeros(())
        per_view = [koleo_loss(features_BC) for features_BC in learned.features_VBC[:GLOBAL_VIEWS]]
        return self.koleo_weight * torch.stack(per_view).sum()

    def _measures(
        self, loss: Tensor, cross_entropy: Tensor, targets_TBK: Tensor, taught: Output
    ) -> dict[str, float]:
        measured = {
            "loss": loss.detach().float(),
            **output_measures(targets_TBK, cross_entropy.detach()),
            **feature_measures(taught.features_VBC[0]),
        }
        # One small reduction and one synchronisation for all of them.
        together = torch.stack([value.to(self.device) for value in measured.values()])
        return dict(zip(measured, mean_over_ranks(together).tolist(), strict=True))

    def _update_student(self, loss: Tensor, mean_loss: float, hold_last_layer: bool) -> bool:
        """Backward pass and optimizer step; false, and nothing changed, when there are no finite gradients.

        Gradients are averaged over the ranks, and so is `mean_loss`: every rank comes to the same answer.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norms = gradient_norms(self._trained)
        if not math.isfinite(mean_loss) or not norms.isfinite().all():
            self.scaler.update()  # in fp16 gradients overflow now and then: the next step has a lower scale
            return False
        if self.clip_grad:
            clip_gradients(self._trained, norms, self.clip_grad)
        if hold_last_layer:
            cancel_last_layer_gradients(self.student)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return True


def teacher_of(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """Give the teacher the student's weights and statistics; returns the teacher."""
    teacher.load_state_dict(student.state_dict())
    return teacher


def _in_parallel(student: nn.Module) -> nn.Module:
    if world_size() == 1:
        return student
    return DistributedDataParallel(student)


def first_nonfinite_module(network: nn.Module, views: Sequence[Tensor]) -> str | None:
    """Name of the first module whose output is not finite, in the order of execution; None if all are."""
    found: list[str] = []
    probe = copy.deepcopy(network)

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                found.append(name)

        probe.get_submodule(name).register_forward_hook(hook)

    for name, module in probe.named_modules():
        if name and not any(module.children()):
            watch(name)
    with torch.no_grad():
        probe(views)
    return found[0] if found else None
