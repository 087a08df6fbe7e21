"""Self-distillation with no labels: student, teacher and one step of DINO's Algorithm 1.

T = teacher's views, V = student's views, B = images, K = prototypes
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino.collapse import feature_measures, output_measures
from dino.loss import dino_loss, koleo_loss
from dino.network import MultiCropNetwork, Output
from dino.optimizer import (
    clip_gradients,
    create_optimizer,
    gradient_norms,
    parameter_groups,
    set_rates,
)
from dino.runtime.distributed import autocast, mean_over_ranks, of_all_ranks, world_size
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
        measures: means over the ranks and parts: `loss`, and those of `dino.collapse`, of which some depend on
            how many pictures they are taken from.
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
        accumulate: parts that a process's pictures of one step go through the student in, one after the other, for
            less memory. Center, targets, gradients and teacher are those of the whole; batch norm and the KoLeo loss
            see one part at a time.
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
        accumulate: int = 1,
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
        self.accumulate = accumulate
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._statistics = [buffer for network in (student, teacher) for buffer in network.buffers()]
        self._last_layer = [
            p for name, p in student.named_parameters() if "last_layer" in name and p.requires_grad
        ]
        self._parallel_student = _in_parallel(student)

    def step(self, views: Sequence[Tensor], rates: Rates) -> StepResult:
        """Algorithm 1 for one batch of views (B, 3, H, W), the two global ones first, on any device."""
        statistics = [buffer.clone() for buffer in self._statistics]
        set_rates(self.optimizer, rates.lr, rates.weight_decay)
        self._hold_last_layer(rates.hold_last_layer)
        self.optimizer.zero_grad(set_to_none=True)

        seen: list[_Seen] = []
        for part, taught, targets_TBK in self._lessons(views, rates.teacher_temperature):
            with self._reduced(when=len(seen) == self.accumulate - 1):
                with autocast(self.device, self.precision):
                    learned: Output = self._parallel_student(part)
                cross_entropy = dino_loss(learned.logits_VBK, targets_TBK, self.student_temperature)
                loss = cross_entropy + self._koleo(learned)
                self.scaler.scale(loss / self.accumulate).backward()
            seen.append(_Seen.of(loss, cross_entropy, targets_TBK, taught))

        measures = self._measures(seen)
        finite = self._update_student(measures["loss"])
        if finite:
            follow(self.teacher, self.student, rates.momentum)
            self.center.update(torch.stack([part.logits_K for part in seen])[None])
        else:
            for buffer, before in zip(self._statistics, statistics, strict=True):
                buffer.copy_(before)
        return StepResult(measures, finite)

    def targets(self, logits_TBK: Tensor, temperature: float) -> Tensor:
        """The teacher's probabilities, centered or balanced, and sharpened."""
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits_TBK, temperature)
        return self.center.targets(logits_TBK, temperature)

    def _lessons(
        self, views: Sequence[Tensor], temperature: float
    ) -> Iterator[tuple[list[Tensor], Output, Tensor]]:
        """Of each part its views on the device, what the teacher makes of them, and the targets."""
        parts = zip(*(view.tensor_split(self.accumulate) for view in views), strict=True)
        lessons = ((part, self._teach(part)) for part in map(self._on_device, parts))
        if self.centering == "sinkhorn_knopp":  # balances the prototypes over the whole batch
            all_lessons = list(lessons)
            logits_TBK = torch.cat([taught.logits_VBK for _, taught in all_lessons], dim=1)
            targets = self.targets(logits_TBK, temperature).tensor_split(self.accumulate, dim=1)
            yield from ((part, taught, t) for (part, taught), t in zip(all_lessons, targets, strict=True))
        else:
            for part, taught in lessons:
                yield part, taught, self.targets(taught.logits_VBK, temperature)

    def _on_device(self, views: Sequence[Tensor]) -> list[Tensor]:
        return [view.to(self.device, non_blocking=True) for view in views]

    @torch.no_grad()
    def _teach(self, views: Sequence[Tensor]) -> Output:
        with autocast(self.device, self.precision):
            return self.teacher(views[:GLOBAL_VIEWS])

    def _koleo(self, learned: Output) -> Tensor:
        if not self.koleo_weight:
            return learned.features_VBC.new_zeros(())
        per_view = [koleo_loss(of_all_ranks(view_BC)) for view_BC in learned.features_VBC[:GLOBAL_VIEWS]]
        value = self.koleo_weight * torch.stack(per_view).sum()
        # Of the pictures of all ranks, with the gradient of this rank's: averaged over the ranks that would be too
        # little, so it counts for each of them.
        return value.detach() + world_size() * (value - value.detach())

    def _measures(self, seen: Sequence["_Seen"]) -> dict[str, float]:
        measured = {
            "loss": torch.stack([part.loss for part in seen]).mean(),
            **_mean_of([part.measures for part in seen]),
        }
        # One small reduction and one synchronisation for all of them.
        together = torch.stack([value.to(self.device) for value in measured.values()])
        return dict(zip(measured, mean_over_ranks(together).tolist(), strict=True))

    def _hold_last_layer(self, hold: bool) -> None:
        """Without a gradient it is neither computed nor reduced, and the optimizer passes the prototypes over."""
        if all(parameter.requires_grad != hold for parameter in self._last_layer):
            return
        for parameter in self._last_layer:
            parameter.requires_grad_(not hold)
        self._parallel_student = _in_parallel(self.student)  # it plans its reductions when it is made

    def _reduced(self, when: bool) -> AbstractContextManager[object]:
        """Gradients are averaged over the ranks, while the backward pass goes on, once in a step."""
        if isinstance(self._parallel_student, DistributedDataParallel) and not when:
            return self._parallel_student.no_sync()
        return nullcontext()

    def _update_student(self, mean_loss: float) -> bool:
        """Optimizer step; false, and nothing changed, when loss or gradients are not finite.

        Gradients are averaged over the ranks, and so is `mean_loss`: every rank comes to the same answer.
        """
        self.scaler.unscale_(self.optimizer)
        norms = gradient_norms(self._trained)
        if not math.isfinite(mean_loss) or not norms.isfinite().all():
            self.scaler.update()  # in fp16 gradients overflow now and then: the next step has a lower scale
            return False
        if self.clip_grad:
            clip_gradients(self._trained, norms, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return True


class _Seen(NamedTuple):
    """What is kept of one part of a step until its end."""

    loss: Tensor
    measures: dict[str, Tensor]
    logits_K: Tensor

    @classmethod
    def of(cls, loss: Tensor, cross_entropy: Tensor, targets_TBK: Tensor, taught: Output) -> "_Seen":
        return cls(
            loss.detach().float(),
            output_measures(targets_TBK, cross_entropy.detach()) | feature_measures(taught.features_VBC[0]),
            taught.logits_VBK.float().mean(dim=(0, 1)),
        )


def _mean_of(measures: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in measures]).mean() for name in measures[0]}


def teacher_of(student: nn.Module, teacher: nn.Module) -> nn.Module:
    """Give the teacher the student's weights and statistics; returns the teacher."""
    teacher.load_state_dict(student.state_dict())
    return teacher


def _in_parallel(student: nn.Module) -> nn.Module:
    if world_size() == 1:
        return student
    return DistributedDataParallel(student)
