"""Classification: training from scratch, or from supervised or DINO weights, and evaluation.

`dino.downstream.classify` is the command.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor, nn

from dino.curves import Panel
from dino.downstream.classification.data import open_both, open_to_evaluate
from dino.downstream.classification.loss import ClassificationLoss, Distillation
from dino.downstream.classification.network import (
    Classifier,
    create_classifier,
    create_teacher,
    hold_patch_embedding,
    names_of_outputs,
    outputs_in,
    pick_architecture,
)
from dino.downstream.classification.options import ClassifyOptions, check_classify_options, mixes
from dino.downstream.classification.presets import PRESETS
from dino.downstream.classification.rates import (
    BATCH_OF_LR,
    create_average,
    create_optimizer,
    create_scheduler,
)
from dino.downstream.classification.scores import Judge, measures_of, write_scores
from dino.downstream.classification.views import training_view
from dino.downstream.length import Length, of_epochs
from dino.downstream.machine import Machine, own_run
from dino.downstream.samples import Samples, create_loader
from dino.downstream.training import Task, Training
from dino.evaluation.extraction import RESIZE_RATIO, Preparation
from dino.evaluation.labelled_sets import class_numbers
from dino.evaluation.linear_classifier import outputs_of
from dino.evaluation.subject import say
from dino.runtime import distributed
from dino.runtime.backbones import tensors_sha256
from dino.runtime.fingerprint import fingerprint
from dino.runtime.interruption import Interruption
from dino.runtime.options import AUTO, UserError
from dino.runtime.pictures import Pictures
from xcit.zoo import SUPERVISED

_REPEATS = 3  # of repeated augmentation
_RESULTS = "classification"
_PANELS = (
    Panel("test_acc1", "Top-1", "accuracy, %", best=True, sparse=True),
    Panel("ema_test_acc1", "Top-1, averaged weights", "accuracy, %", best=True, sparse=True),
    Panel("test_loss", "Loss on val", "nats", sparse=True),
)


def classify(options: ClassifyOptions) -> None:
    """Train, or evaluate with `--eval`.

    Raises:
        UserError: options, pictures, weights or files that do not fit.
        RunStopped: the run ended early for a stated reason, after saving.
    """
    machine = Machine.of(options)
    with own_run(options, machine, partial(check_classify_options, options)) as interruption:
        run = _evaluate if options.eval else _train
        run(options, machine, interruption)


def _train(options: ClassifyOptions, machine: Machine, interruption: Interruption) -> None:
    with distributed.together():
        train, val = open_both(options.data_set, options.data_path, options.inat_category)
        train.as_stored = val.as_stored = options.as_stored
        classifier, notes = _create(options, len(train.classes))
        length = of_epochs(
            len(train), options.batch_size, options.epochs, repeats=_REPEATS if options.repeated_aug else 1
        )
        loss = _create_loss(options, machine.device, len(train.classes))
    network = classifier.network.to(machine.device)
    judge = _judge(options, machine, val, class_numbers(val.classes, train.classes))
    samples = Samples(len(train), _LabelledView(train, _view(options)), seed=options.seed)
    task = Task(
        network,
        losses=loss,
        evaluate=judge.measures,
        best_by="test_acc1",
        open_loader=partial(
            create_loader,
            samples,
            _collate,
            num_workers=machine.num_workers,
            pin_memory=machine.device.type == "cuda",
        ),
        facts={"classes": list(train.classes)},
        panels=_PANELS,
    )
    optimizer = create_optimizer(options, network, length.global_batch)
    training = Training(
        task,
        optimizer,
        create_scheduler(options, optimizer, length.steps_per_round),
        length,
        options,
        interruption,
        device=machine.device,
        precision=machine.precision,
        num_workers=machine.num_workers,
        clip_grad=options.clip_grad,
        val_every=options.test_freq,
        ema=create_average(options, network),
        resume_from=_resume_from(options.resume),
    )
    rows = training.run([*_opening(options, machine, train, val, length, classifier), *notes])
    if distributed.is_main():
        _finish(options, judge, rows, train, val, network)


def _evaluate(options: ClassifyOptions, machine: Machine, _: Interruption) -> None:
    with distributed.together():
        val, classes = open_to_evaluate(options.data_set, options.data_path, options.inat_category)
        val.as_stored = options.as_stored
        classifier, _notes = _create(options, None)
        outputs = outputs_in(classifier.network)
        numbers = outputs_of(outputs, classifier.classes, val.classes, classes)
    say(f"{classifier.arch}: {classifier.note}")
    judge = _judge(options, machine, val, numbers)
    scores = judge.scores(classifier.network.to(machine.device), progress="val pictures")
    if not distributed.is_main():
        return
    for broken in scores.broken:
        print(f"left out: {broken}")
    five = "" if scores.top5 is None else f"Acc@5 {scores.top5:.3f} "
    print(f"* Acc@1 {scores.top1:.3f} {five}loss {scores.loss:.3f}")
    print(f"Accuracy of the network on the {len(scores.labels)} test images: {scores.top1:.1f}%")
    facts = {
        "arch": classifier.arch,
        "weights": _weights(options),
        "network_sha256": tensors_sha256(classifier.network),
        "data_sha256": {"val": fingerprint(val).content},
        "preprocessing": {**asdict(judge.preparation), "as_stored": options.as_stored},
        "device": distributed.describe(machine.device),
        "results": measures_of(scores),
        "broken": scores.broken,
    }
    named = {number: name for number, name in zip(numbers.tolist(), val.classes, strict=True)}
    names = [named.get(number, str(number)) for number in range(outputs)]
    write_scores(Path(options.output_dir), "classification, evaluated", facts, scores, names)


def _weights(options: ClassifyOptions) -> str:
    return options.weights or options.pretrained or (options.resume if options.eval else "")


def _create(options: ClassifyOptions, num_classes: int | None) -> tuple[Classifier, list[str]]:
    """The network, and lines on what was done to it."""
    weights = _weights(options)
    arch, patch_size = pick_architecture(options.model, options.patch_size, weights)
    if options.drop and arch.startswith("xcit"):
        raise UserError(f"--drop {options.drop:g}: XCiT has no dropout; use --drop_path")
    torch.manual_seed(options.seed)
    classifier = create_classifier(
        arch,
        num_classes,
        patch_size=patch_size,
        input_size=options.input_size,
        drop_path_rate=options.drop_path,
        weights=weights,
        key=options.checkpoint_key,
    )
    if options.grad_checkpointing:
        classifier.network.set_grad_checkpointing()  # type: ignore[operator]
    notes = [hold_patch_embedding(classifier.network, options.surgery)] if options.surgery else []
    return classifier, notes


def _create_loss(options: ClassifyOptions, device: torch.device, num_classes: int) -> ClassificationLoss:
    mixup = None
    if mixes(options):
        mixup = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            cutmix_minmax=options.cutmix_minmax or None,
            prob=options.mixup_prob,
            switch_prob=options.mixup_switch_prob,
            mode=options.mixup_mode,
            label_smoothing=options.smoothing,
            num_classes=num_classes,
        )
    distillation = None
    if options.distillation_type != "none":
        teacher = create_teacher(options.teacher_model, options.teacher_path, num_classes)
        hard = options.distillation_type == "hard"
        distillation = Distillation(
            teacher.to(device), hard, options.distillation_alpha, options.distillation_tau
        )
    return ClassificationLoss(device, mixup, options.smoothing, distillation)


def _resume_from(path: str) -> Path | None:
    return Path(path).expanduser() if path else None


def _view(options: ClassifyOptions) -> Any:
    return training_view(
        options.input_size,
        scale=options.crop_scale,
        color_jitter=options.color_jitter,
        auto_augment=options.aa,
        interpolation=options.train_interpolation,
        erase=options.reprob,
        erase_mode=options.remode,
        erase_count=options.recount,
    )


class _LabelledView:
    """The view and the label of a picture."""

    def __init__(self, pictures: Pictures, view: Any) -> None:
        self.pictures = pictures
        self.view = view

    def __call__(self, index: int) -> tuple[Tensor, int]:
        assert self.pictures.labels is not None
        return self.view(self.pictures.picture(index)), self.pictures.labels[index]


def _collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([view for view, _ in samples]), torch.tensor([label for _, label in samples])


def _judge(options: ClassifyOptions, machine: Machine, val: Pictures, numbers: np.ndarray) -> Judge:
    published = options.eval and _weights(options) in SUPERVISED
    whole = options.full_crop == "true" or (options.full_crop == AUTO and published)
    preparation = Preparation(options.input_size, 1.0 if whole else RESIZE_RATIO, machine.precision)
    return Judge(preparation, val, numbers, options.batch_size, machine.device, machine.num_workers)


def _opening(
    options: ClassifyOptions,
    machine: Machine,
    train: Pictures,
    val: Pictures,
    length: Length,
    classifier: Classifier,
) -> list[str]:
    preset = PRESETS[options.preset]
    parameters = sum(parameter.numel() for parameter in classifier.network.parameters())
    rate = options.lr * length.global_batch / BATCH_OF_LR
    repeated = f", each picture {_REPEATS} times in a row" if options.repeated_aug else ""
    return [
        *([f"preset:    {preset.name}: {preset.purpose}"] if preset.why else []),
        *(f"           {reason}" for reason in preset.why),
        f"pictures:  {len(train):,} to train on and {len(val):,} to evaluate on, in {len(train.classes)} classes, "
        f"from {options.data_path if options.data_set == 'IMNET' else options.data_set}",
        f"network:   {classifier.arch}, {parameters / 1e6:.1f} M parameters; {classifier.note}",
        f"steps:     {options.epochs:,} epochs x {length.steps_per_epoch:,} steps of {length.global_batch:,} pictures "
        f"of {options.input_size} px{repeated}",
        f"rates:     learning rate {options.lr:g} x {length.global_batch} / {BATCH_OF_LR} = {rate:.3g}",
        f"computing: {machine.device}, {machine.precision}",
        f"output:    {Path(options.output_dir).resolve()}",
    ]


def _finish(
    options: ClassifyOptions,
    judge: Judge,
    rows: Sequence[Mapping[str, Any]],
    train: Pictures,
    val: Pictures,
    network: nn.Module,
) -> None:
    evaluated = [row for row in rows if "test_acc1" in row]
    if not evaluated:
        return
    best = max(evaluated, key=lambda row: max(row["test_acc1"], row.get("ema_test_acc1", 0.0)))
    top1 = max(best["test_acc1"], best.get("ema_test_acc1", 0.0))
    print(f"Max accuracy: {top1:.2f}% after epoch {best['epoch']} (it is chosen on these very pictures)")
    facts = {
        "data_sha256": {"train": fingerprint(train).content, "val": fingerprint(val).content},
        "pictures": {"train": len(train), "val": len(val)},
        "network_sha256": tensors_sha256(network),
        "options": asdict(options),
        "last": evaluated[-1],
        "best": best,
    }
    folder = Path(options.output_dir)
    if judge.last is not None:
        write_scores(folder, _RESULTS, facts, judge.last, names_of_outputs(train.classes, len(train.classes)))
