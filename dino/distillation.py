"""Self-distillation with no labels: student, teacher and one step of DINO's Algorithm 1.

T = teacher's views, V = student's views, B = images, K = prototypes
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino.collapse import feature_measures, output_measures
from dino.copies import Copies
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
from dino.step_result import StepResult
from dino.teacher import Center, follow, sinkhorn_knopp

GLOBAL_VIEWS = 2
# The singular values of the features make a GPU wait, so there they are taken once in so many steps.
_STEPS_PER_LOOK_AT_FEATURES = 25


class Rates(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    hold_last_layer: bool


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
        shared = set(student.parameters()) & set(teacher.parameters())
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
        self._statistics = [*student.buffers(), *teacher.buffers(), self.center.center]
        # SGD and LARS, and AdamW on Apple's GPUs, cannot be told by a tensor to leave all as it was.
        self._optimizer_can_skip = isinstance(self.optimizer, torch.optim.AdamW) and self.device.type != "mps"
        self._features_seen: dict[str, Tensor] = {}
        self._steps_until_look = 0
        self._last_layer = [
            p for name, p in student.named_parameters() if "last_layer" in name and p.requires_grad
        ]
        self._parallel_student = _in_parallel(student)

    def step(self, views: Sequence[Tensor], rates: Rates) -> StepResult:
        """Algorithm 1 for one batch of views (B, 3, H, W), the two global ones first, on any device.

        A step whose loss or gradients are not finite changes nothing. With AdamW on CUDA the host does not wait for
        the device: not to skip the step either.
        """
        before = Copies(self._statistics)
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
            seen.append(_Seen.of(loss, output_measures(targets_TBK, cross_entropy.detach()), taught))

        measures = self._measures(seen)
        finite = self._update_student(measures["loss"])
        follow_if(finite, self.teacher, self.student, momentum=rates.momentum)
        self.center.update(torch.stack([part.logits_K for part in seen])[None])
        before.restore_unless(finite)
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

    def _measures(self, seen: Sequence["_Seen"]) -> dict[str, Tensor]:
        measured = {
            "loss": torch.stack([part.loss for part in seen]).mean(),
            **_mean_of([part.measures for part in seen]),
            **self._measures_of_features(part.features_BC for part in seen),
        }
        # One small reduction for all of them.
        together = torch.stack([value.to(self.device) for value in measured.values()])
        return dict(zip(measured, mean_over_ranks(together).unbind(), strict=True))

    def _measures_of_features(self, features: Iterable[Tensor]) -> dict[str, Tensor]:
        """On CUDA those of one of the last steps that was finite."""
        if self._steps_until_look == 0:
            fresh = _mean_of([feature_measures(features_BC) for features_BC in features])
            seen = self._features_seen if self.device.type == "cuda" else {}
            self._features_seen = {
                name: torch.where(value.isfinite(), value, seen.get(name, value))
                for name, value in fresh.items()
            }
            self._steps_until_look = _STEPS_PER_LOOK_AT_FEATURES if self.device.type == "cuda" else 1
        self._steps_until_look -= 1
        return self._features_seen

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

    def _update_student(self, mean_loss: Tensor) -> Tensor:
        """Optimizer step; false, and nothing changed, when loss or gradients are not finite.

        Gradients are averaged over the ranks, and so is `mean_loss`: every rank comes to the same answer.
        """
        self.scaler.unscale_(self.optimizer)
        norms = gradient_norms(self._trained)
        finite = mean_loss.isfinite() & norms.isfinite().all()
        if self.clip_grad:
            clip_gradients(self._trained, norms, self.clip_grad)
        if self._optimizer_can_skip:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # as GradScaler tells it
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.scaler.update()  # in fp16 gradients overflow now and then: the next step has a lower scale
        return finite


class _Seen(NamedTuple):
    """What is kept of one part of a step until its end."""

    loss: Tensor
    measures: dict[str, Tensor]
    features_BC: Tensor
    logits_K: Tensor

    @classmethod
    def of(cls, loss: Tensor, measures: dict[str, Tensor], taught: Output) -> "_Seen":
        return cls(
            loss.detach().float(),
            measures,
            taught.features_VBC[0],
            taught.logits_VBK.float().mean(dim=(0, 1)),
        )


def follow_if(finite: Tensor, teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """`teacher.follow` where the bool scalar is true, else nothing; on a GPU without asking which of them."""
    if not finite.is_cpu:
        follow_by(finite * (1.0 - momentum), teacher, student)
    elif finite:
        follow(teacher, student, momentum)


@torch.no_grad()
def follow_by(weight: Tensor, teacher: nn.Module, student: nn.Module) -> None:
    """teacher <- teacher + weight * (student - teacher), for parameters only, with a scalar on their device."""
    followers: list[Tensor] = list(teacher.parameters())
    steps = torch._foreach_sub([parameter.detach() for parameter in student.parameters()], followers)
    torch._foreach_mul_(steps, weight)
    torch._foreach_add_(followers, steps)


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
