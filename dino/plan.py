"""What the options ask for: length and rates of the run, its views and networks, looks at it; or that it cannot be."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image

from dino import schedules
from dino.distillation import Rates, SelfDistillation, teacher_of
from dino.head import DinoHead
from dino.monitor import Monitor, open_parts
from dino.multicrop import MultiCrop, Views
from dino.network import MultiCropNetwork
from dino.runtime import distributed
from dino.runtime.backbones import check_side, create_backbone, feature_width
from dino.runtime.batch_norm import synchronised
from dino.runtime.compiler import pick_compile
from dino.runtime.interruption import Interruption
from dino.runtime.options import AUTO, UserError
from dino.runtime.pictures import Pictures
from dino.train_options import TrainOptions

_COUNTS = (
    *("head_hidden_dim", "bottleneck_dim", "patch_size", "epochs", "batch_size_per_gpu", "accumulate"),
    *("global_crops_size", "local_crops_size", "knn_max_pictures"),
)
_NOT_NEGATIVE = (
    *("lr", "min_lr", "weight_decay", "weight_decay_end", "clip_grad", "freeze_last_layer", "koleo_weight"),
    *("local_crops_number", "blur", "num_workers", "seed", "eval_size", "batch_size", "knn_drop"),
)


@dataclass(frozen=True)
class Plan:
    """The length of the run and its rates by step."""

    steps_per_epoch: int
    steps: int
    lr: schedules.Schedule
    weight_decay: schedules.Schedule
    momentum: schedules.Schedule
    teacher_temperature: schedules.Schedule
    held_steps: int

    def rates(self, step: int) -> Rates:
        return Rates(
            float(self.lr[step]),
            float(self.weight_decay[step]),
            float(self.momentum[step]),
            float(self.teacher_temperature[step]),
            step < self.held_steps,
        )

    def means(self, epoch: int) -> dict[str, float]:
        """Of the rates, over the steps of an epoch."""
        steps = slice(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        of_steps = {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "teacher_temperature": self.teacher_temperature,
            "momentum": self.momentum,
        }
        return {name: float(rate[steps].mean()) for name, rate in of_steps.items()}


class Share(NamedTuple):
    """How a step is shared out: pictures of all processes, and what one of them computes at once."""

    global_batch: int
    at_once: int


def share_of_step(options: TrainOptions) -> Share:
    """From `--batch_size`, or else `--batch_size_per_gpu`, and `--accumulate`.

    Raises:
        UserError: a `--batch_size` that cannot be shared equally.
    """
    parts = distributed.world_size() * options.accumulate
    if not options.batch_size:
        return Share(options.batch_size_per_gpu * parts, options.batch_size_per_gpu)
    at_once, rest = divmod(options.batch_size, parts)
    if rest or not at_once:
        raise UserError(
            f"--batch_size {options.batch_size} cannot be shared equally by {distributed.world_size()} processes with "
            f"--accumulate {options.accumulate}: give a multiple of {parts}"
        )
    return Share(options.batch_size, at_once)


def create_plan(options: TrainOptions, count: int, global_batch: int) -> Plan:
    steps_per_epoch = count // global_batch
    if not steps_per_epoch:
        flag, most = "--batch_size_per_gpu", max(count // (distributed.world_size() * options.accumulate), 1)
        if options.batch_size:
            flag, most = "--batch_size", count
        raise UserError(
            f"an epoch has no step: {count} pictures do not fill one batch of {global_batch}; "
            f"lower {flag} to {most} or less"
        )
    steps = options.epochs * steps_per_epoch
    return Plan(
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        lr=schedules.cosine(
            options.lr * global_batch / 256,
            options.min_lr,
            steps,
            warmup_steps=options.warmup_epochs * steps_per_epoch,
        ),
        weight_decay=schedules.cosine(options.weight_decay, options.weight_decay_end, steps),
        momentum=schedules.cosine(options.momentum_teacher, 1.0, steps),
        teacher_temperature=schedules.teacher_temperature(
            options.warmup_teacher_temp,
            options.teacher_temp,
            warmup_epochs=options.warmup_teacher_temp_epochs,
            epochs=options.epochs,
            steps_per_epoch=steps_per_epoch,
        ),
        held_steps=options.freeze_last_layer * steps_per_epoch,
    )


def check_options(options: TrainOptions) -> None:
    """Refuse what cannot work before anything is opened or written."""
    for name in _COUNTS:
        _require(options, name, getattr(options, name) >= 1, "must be 1 or more")
    _require(options, "out_dim", options.out_dim >= 2, "must be 2 or more")
    _require(options, "seed", options.seed < 2**63, "must be below 2^63")
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        fits = 0 <= getattr(options, name) <= options.epochs
        _require(options, name, fits, f"must lie between 0 and --epochs ({options.epochs})")
    for name in ("global_crops_scale", "local_crops_scale"):
        least, most = getattr(options, name)
        _require(options, name, 0 < least <= most <= 1, "must be two rising numbers in (0, 1]")
    for name in ("teacher_temp", "warmup_teacher_temp"):
        _require(options, name, getattr(options, name) > 0, "must be above 0")
    for name in _NOT_NEGATIVE:
        _require(options, name, getattr(options, name) >= 0, "must be 0 or more")
    for name in ("momentum_teacher", "grayscale"):
        _require(options, name, 0 <= getattr(options, name) <= 1, "must lie in [0, 1]")
    _require(options, "drop_path_rate", 0 <= options.drop_path_rate < 1, "must lie in [0, 1)")
    if options.preset == "continue" and not options.init_from:
        raise UserError("--preset continue starts from weights: name them with --init_from")
    _require(options, "wait_minutes", options.wait_minutes > 0, "must be above 0")
    jitter_fits = min(options.color_jitter) >= 0 and options.color_jitter[-1] <= 0.5
    _require(options, "color_jitter", jitter_fits, "must be four numbers from 0 up, the last at most 0.5")


def _require(options: TrainOptions, name: str, holds: bool, rule: str) -> None:
    if not holds:
        value = getattr(options, name)
        written = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise UserError(f"--{name} {rule}, got {written}")


def create_multicrop(options: TrainOptions) -> MultiCrop:
    return MultiCrop(
        global_size=options.global_crops_size,
        local_size=options.local_crops_size,
        global_scale=options.global_crops_scale,
        local_scale=options.local_crops_scale,
        local_number=options.local_crops_number,
        jitter=options.color_jitter,
        grayscale=options.grayscale,
        blur=options.blur,
    )


def create_views(options: TrainOptions, device: torch.device) -> Callable[[Image.Image], Views]:
    """What the workers make of a picture; `OnDevice` does the rest, whatever it is."""
    crop = create_multicrop(options)
    on_device = options.augment_on == "device" or (options.augment_on == AUTO and device.type == "cuda")
    return crop.cropped if on_device else crop.distorted


def create_monitor(
    options: TrainOptions,
    pictures: Pictures,
    *,
    device: torch.device,
    precision: str,
    num_workers: int,
    interruption: Interruption,
    say: Callable[[str], None],
) -> Monitor | None:
    """None where nobody is to look."""
    if options.knn_freq <= 0:
        return None
    train, test = open_parts(options.data_path, pictures, knn_data=options.knn_data)
    return Monitor(
        Path(options.output_dir),
        train,
        test,
        max_pictures=options.knn_max_pictures,
        size=options.eval_size or options.global_crops_size,
        device=device,
        precision=precision,
        num_workers=num_workers,
        interruption=interruption,
        say=say,
    )


def create_distillation(options: TrainOptions, device: torch.device, precision: str) -> SelfDistillation:
    """Student and teacher with equal random weights, on their device."""
    torch.manual_seed(options.seed)
    student = _create_network(options, options.drop_path_rate)
    teacher = _create_network(options, drop_path_rate=0.0)
    teacher_of(student, teacher)
    if distributed.world_size() > 1:
        for network in (student, teacher):
            network.backbone = synchronised(network.backbone, device)
            network.head = synchronised(network.head, device)
    if options.grad_checkpointing:
        try:
            cast(Any, student.backbone).set_grad_checkpointing()
        except (AttributeError, AssertionError):  # timm asserts
            raise UserError(f"--grad_checkpointing true: {options.arch} cannot do that") from None
    if _compiles(options, device):
        student.compile()
        teacher.compile()
    return SelfDistillation(
        student.to(device),
        teacher.to(device),
        num_prototypes=options.out_dim,
        optimizer=options.optimizer,
        clip_grad=options.clip_grad,
        centering=options.centering,
        koleo_weight=options.koleo_weight,
        precision=precision,
        accumulate=options.accumulate,
    )


def _compiles(options: TrainOptions, device: torch.device) -> bool:
    """Not where activations are recomputed: of compiled batch norm torch refuses that, once the views of another size
    have changed its statistics.
    """
    if not options.grad_checkpointing:
        return pick_compile(options.compile, device)
    if options.compile == "true":
        raise UserError("--compile true does not go with --grad_checkpointing true: leave out one of them")
    return False


def _create_network(options: TrainOptions, drop_path_rate: float) -> MultiCropNetwork:
    backbone = create_backbone(options.arch, options.patch_size, drop_path_rate)
    check_side(backbone, options.global_crops_size, "--global_crops_size")
    if options.local_crops_number:
        check_side(backbone, options.local_crops_size, "--local_crops_size")
    head = DinoHead(
        feature_width(backbone),
        options.out_dim,
        use_bn=options.use_bn_in_head,
        norm_last_layer=options.norm_last_layer,
        hidden_dim=options.head_hidden_dim,
        bottleneck_dim=options.bottleneck_dim,
    )
    return MultiCropNetwork(backbone, head)
