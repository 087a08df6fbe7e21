"""Semantic segmentation: training, scoring, and drawing what a network sees in pictures.

`dino.downstream.segment` is the command.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.curves import Panel
from dino.downstream.length import Length, of_iterations
from dino.downstream.machine import Machine, own_run
from dino.downstream.samples import Samples, create_loader
from dino.downstream.segmentation.classes import VOID, Classes, check_same
from dino.downstream.segmentation.data import MaskedPictures, SegmentationData, open_data
from dino.downstream.segmentation.evaluation import Evaluation
from dino.downstream.segmentation.inference import Predictor
from dino.downstream.segmentation.network import (
    FACTS_KEY,
    NamedSegmenter,
    SegmenterWeights,
    create_segmenter,
    open_weights,
)
from dino.downstream.segmentation.options import SegmentOptions, check_segment_options, chosen_scale
from dino.downstream.segmentation.pictures import draw_pictures
from dino.downstream.segmentation.rates import create_optimizer, create_scheduler
from dino.downstream.segmentation.report import opening_lines, report
from dino.downstream.segmentation.views import TestView, TrainingViews
from dino.downstream.state import own_weights
from dino.downstream.training import Task, Training
from dino.evaluation.subject import say
from dino.runtime import distributed
from dino.runtime.files import make_writable
from dino.runtime.interruption import Interruption
from dino.runtime.options import UserError
from xcit.segmenter import segmentation_losses

_TRAINED, _EVALUATED = "segmentation", "segmentation, evaluated"  # in results.json
_PANELS = (
    Panel("miou", "Mean IoU", "%", best=True, sparse=True),
    Panel("pixel_accuracy", "Pixel accuracy", "%", sparse=True),
)


def segment(options: SegmentOptions) -> None:
    """Train, score with `--eval`, or draw with `--input`.

    Raises:
        UserError: options, pictures, masks, weights or files that do not fit.
        RunStopped: the run ended early for a stated reason, after saving.
    """
    machine = Machine.of(options)
    if options.input:
        _draw(options, machine)
        return
    with own_run(options, machine, partial(check_segment_options, options)) as interruption:
        run = _evaluate if options.eval else _train
        run(options, machine, interruption)


def _train(options: SegmentOptions, machine: Machine, interruption: Interruption) -> None:
    with distributed.together():
        weights = open_weights(options.weights, key=options.checkpoint_key)
    data = _open_data(options, weights)
    with distributed.together():
        named = _create(options, weights, len(data.classes))
        length = _length(options, len(data.train), named.head)
    network = named.network.to(machine.device)
    scale = chosen_scale(options.scale, weights.scale)
    evaluation = _evaluation(options, machine, data.val, named, scale, interruption)
    optimizer = create_optimizer(options, network)
    training = Training(
        Task(
            network,
            losses=partial(_losses, device=machine.device),
            evaluate=evaluation,
            best_by="miou",
            open_loader=partial(
                create_loader,
                Samples(
                    len(data.train), _TrainingSample(data.train, _views(options, scale)), seed=options.seed
                ),
                _collate,
                num_workers=machine.num_workers,
                pin_memory=machine.device.type == "cuda",
            ),
            facts=_facts(named, data.classes, scale),
            panels=_PANELS,
        ),
        optimizer,
        create_scheduler(options, optimizer),
        length,
        options,
        interruption,
        device=machine.device,
        precision=machine.precision,
        num_workers=machine.num_workers,
        clip_grad=options.clip_grad,
        resume_from=Path(options.resume).expanduser() if options.resume else None,
    )
    rows = training.run(
        opening_lines(options, data, named, length, scale, f"{machine.device}, {machine.precision}")
    )
    evaluated = [row for row in rows if "miou" in row]
    if distributed.is_main() and evaluation.scores and evaluated:
        best = max(evaluated, key=lambda row: row["miou"])
        report(options, named, evaluation, _TRAINED, {"last": evaluated[-1], "best": best})


def _evaluate(options: SegmentOptions, machine: Machine, interruption: Interruption) -> None:
    with distributed.together():
        weights = _trained_weights(options)
    data = _open_data(options, weights, need_train=False)
    with distributed.together():
        assert weights.classes is not None
        check_same(weights.classes, data.classes, weights.source, certain=weights.certain)
        named = _create(options, weights, len(data.classes))
    say(str(named))
    scale = chosen_scale(options.scale, weights.scale)
    evaluation = _evaluation(options, machine, data.val, named, scale, interruption)
    with torch.no_grad():
        evaluation(named.network.to(machine.device).eval())
    if distributed.is_main():
        report(options, named, evaluation, _EVALUATED, {"weights": weights.source})


def _draw(options: SegmentOptions, machine: Machine) -> None:
    check_segment_options(options)
    make_writable(Path(options.output_dir), "--output_dir")
    weights = _trained_weights(options)
    assert weights.classes is not None
    named = _create(options, weights, len(weights.classes))
    print(named)
    scale = chosen_scale(options.scale, weights.scale)
    predictor = _predictor(
        options, machine, replace(named, network=named.network.to(machine.device).eval()), scale
    )
    draw_pictures(
        options.input,
        Path(options.output_dir),
        predictor,
        weights.classes,
        opacity=options.opacity,
        legend=options.legend,
    )


def _trained_weights(options: SegmentOptions) -> SegmenterWeights:
    """Of a whole network: those that are named, or that a run has left."""
    source = options.weights or own_weights(Path(options.output_dir))
    weights = open_weights(source, key=options.checkpoint_key)
    if weights.classes is None:
        raise UserError(
            f"{source} is a backbone, which knows no classes: --eval and --input need a trained segmentation network"
        )
    return weights


def _open_data(
    options: SegmentOptions, weights: SegmenterWeights, *, need_train: bool = True
) -> SegmentationData:
    """The data; one process looks through the masks, and tells the others the classes."""
    opened = partial(
        open_data,
        options.data_path,
        ignore=options.ignore,
        num_classes=options.num_classes,
        reduce_zero_label=options.reduces_zero_label,
        fallback=None if need_train else weights.classes,
        need_train=need_train,
    )
    known = None if need_train or not weights.certain else weights.classes
    with distributed.together():
        first = opened(known=known, look_through=options.check_masks) if distributed.is_main() else None
    (classes,) = distributed.gather([first.classes] if first else [])
    with distributed.together():
        return first or opened(known=classes, look_through=False)


def _create(options: SegmentOptions, weights: SegmenterWeights, num_classes: int) -> NamedSegmenter:
    named = create_segmenter(
        weights,
        num_classes,
        arch=options.arch,
        head=options.head,
        drop_path=options.drop_path,
        key=options.checkpoint_key,
        seed=options.seed,
    )
    named.network.pyramid.trunk.set_grad_checkpointing(options.grad_checkpointing)
    return named


def _length(options: SegmentOptions, count: int, head: str) -> Length:
    each, rest = divmod(options.batch_size, distributed.world_size())
    if rest or not each:
        raise UserError(
            f"--batch_size {options.batch_size}: must be a multiple of the {distributed.world_size()} processes"
        )
    if head == "upernet" and options.batch_size == 1:
        raise UserError(
            "--batch_size 1: UPerNet normalises one value per picture over the pictures of a step, and needs 2 or more"
        )
    return of_iterations(count, each, options.iterations, every=options.val_every)


def _views(options: SegmentOptions, scale: tuple[int, int] | None) -> TrainingViews:
    return TrainingViews(
        options.crop,
        scale,
        ratios=options.ratios,
        most_of_one=options.cat_max_ratio,
        flip=options.flip,
        photometric=options.photometric,
    )


class _TrainingSample:
    """A view of a picture, and the places of its classes."""

    def __init__(self, pictures: MaskedPictures, views: TrainingViews) -> None:
        self.pictures = pictures
        self.views = views

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.views(*self.pictures.read(index))


def _collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([pixels for pixels, _ in samples]), torch.stack([places for _, places in samples])


def _losses(
    network: nn.Module, content: tuple[Tensor, Tensor], *, device: torch.device
) -> Mapping[str, Tensor]:
    pixels, places = (part.to(device, non_blocking=True) for part in content)
    return segmentation_losses(network(pixels), places, ignored=VOID)


def _predictor(
    options: SegmentOptions, machine: Machine, named: NamedSegmenter, scale: tuple[int, int] | None
) -> Predictor:
    window, stride = options.windows
    return Predictor(named.network, TestView(scale), window, stride, machine.device, machine.precision)


def _evaluation(
    options: SegmentOptions,
    machine: Machine,
    val: MaskedPictures,
    named: NamedSegmenter,
    scale: tuple[int, int] | None,
    interruption: Interruption,
) -> Evaluation:
    return Evaluation(_predictor(options, machine, named, scale), val, interruption)


def _facts(named: NamedSegmenter, classes: Classes, scale: tuple[int, int] | None) -> dict[str, Any]:
    """What `open_weights` finds in a checkpoint."""
    facts = {"arch": named.arch, "head": named.head, "classes": classes.plain(), "scale": list(scale or (0,))}
    return {FACTS_KEY: facts}
