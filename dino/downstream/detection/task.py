"""Detection and instance segmentation: training, scoring, and drawing what a network finds in pictures.

`dino.downstream.detect` is the command.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dino.curves import Panel
from dino.downstream.detection.coco import CocoSet, open_coco
from dino.downstream.detection.coco_scores import table
from dino.downstream.detection.evaluation import Evaluation, Finder
from dino.downstream.detection.network import (
    FACTS_KEY,
    DetectorWeights,
    NamedDetector,
    create_detector,
    open_weights,
)
from dino.downstream.detection.options import DetectOptions, check_detect_options, chosen_sides
from dino.downstream.detection.pictures import draw_pictures
from dino.downstream.detection.rates import create_optimizer, create_scheduler
from dino.downstream.detection.samples import TrainingSample, collate, losses_of
from dino.downstream.detection.views import DetectionViews
from dino.downstream.length import Length, of_epochs
from dino.downstream.machine import Machine, own_run
from dino.downstream.samples import Samples, create_loader
from dino.downstream.state import own_weights
from dino.downstream.training import Task, Training
from dino.evaluation.results import write_results
from dino.evaluation.subject import say
from dino.runtime import distributed
from dino.runtime.backbones import tensors_sha256
from dino.runtime.files import expanded, make_writable
from dino.runtime.interruption import Interruption
from dino.runtime.options import UserError

_TRAINED, _EVALUATED = "detection", "detection, evaluated"  # in results.json
_PANELS = (
    Panel("mask_ap", "Mask AP", "%", best=True, sparse=True),
    Panel("box_ap", "Box AP", "%", best=True, sparse=True),
)


def detect(options: DetectOptions) -> None:
    """Train, score with `--eval`, or draw with `--input`.

    Raises:
        UserError: options, pictures, annotations, weights or files that do not fit.
        RunStopped: the run ended early for a stated reason, after saving.
    """
    machine = Machine.of(options)
    if options.input:
        _draw(options, machine)
        return
    with own_run(options, machine, partial(check_detect_options, options)) as interruption:
        run = _evaluate if options.eval else _train
        run(options, machine, interruption)


def _train(options: DetectOptions, machine: Machine, interruption: Interruption) -> None:
    with distributed.together():
        weights = open_weights(options.weights, key=options.checkpoint_key)
        train, keeps_head = _open_train(options, weights)
        val = _open_val(options, train.classes, train)
        named = _create(options, weights, len(train.classes), fresh=not keeps_head)
        length = _length(options, len(train))
    network = named.network.to(machine.device)
    evaluation = Evaluation(Finder(machine.device, machine.precision), val, interruption)
    optimizer = create_optimizer(options, network, machine.device)
    task = Task(
        network,
        losses=partial(losses_of, device=machine.device),
        evaluate=evaluation,
        best_by="mask_ap",
        open_loader=partial(
            create_loader,
            Samples(len(train), TrainingSample(train, _views(options)), seed=options.seed),
            collate,
            num_workers=machine.num_workers,
            pin_memory=machine.device.type == "cuda",
        ),
        facts=_facts(options, weights, train, keeps_head),
        panels=_PANELS,
    )
    training = Training(
        task,
        optimizer,
        create_scheduler(options, optimizer, length),
        length,
        options,
        interruption,
        device=machine.device,
        precision=machine.precision,
        num_workers=machine.num_workers,
        clip_grad=options.clip_grad,
        val_every=options.val_every,
        resume_from=expanded(options.resume, "--resume") if options.resume else None,
    )
    rows = training.run(_opening(options, machine, train, val, named, length))
    evaluated = [row for row in rows if "mask_ap" in row]
    if distributed.is_main() and evaluated:
        best = max(evaluated, key=lambda row: row["mask_ap"])
        _finish(options, machine, named, evaluation, evaluated[-1], _TRAINED, {"best": best})


def _evaluate(options: DetectOptions, machine: Machine, interruption: Interruption) -> None:
    with distributed.together():
        weights = _trained_weights(options)
        assert weights.classes is not None
        # As many of the training pictures as a trial was made with.
        trial = bool(options.max_pictures) and not options.val_annotations
        train = _open_train(options, weights)[0] if trial else None
        val = _open_val(options, weights.classes.names if weights.classes.certain else (), train)
        if len(val.classes) != len(weights.classes.names):
            raise UserError(
                f"{weights.source} tells {len(weights.classes.names)} classes apart and does not name them; the "
                f"annotations have {len(val.classes)} categories"
            )
        named = _create(options, weights, len(val.classes))
    for line in (*val.left_out, str(named)):
        say(line)
    evaluation = Evaluation(Finder(machine.device, machine.precision), val, interruption)
    measures = evaluation(named.network.to(machine.device).eval())
    if distributed.is_main():
        _finish(options, machine, named, evaluation, measures, _EVALUATED, {"weights": weights.source})


def _draw(options: DetectOptions, machine: Machine) -> None:
    check_detect_options(options)
    make_writable(Path(options.output_dir), "--output_dir")
    weights = _trained_weights(options)
    assert weights.classes is not None
    named = _create(options, weights, len(weights.classes.names))
    print(named)
    find = partial(Finder(machine.device, machine.precision), named.network.to(machine.device).eval())
    draw_pictures(
        options.input,
        Path(options.output_dir),
        find,
        weights.classes,
        threshold=options.draw_threshold,
        opacity=options.opacity,
    )


def _trained_weights(options: DetectOptions) -> DetectorWeights:
    """Of a whole detector: those that are named, or that a run has left."""
    source = options.weights or own_weights(Path(options.output_dir))
    weights = open_weights(source, key=options.checkpoint_key)
    if weights.classes is None:
        raise UserError(
            f"{source} is a backbone, which knows no classes: --eval and --input need a trained detector"
        )
    return weights


def _open_train(options: DetectOptions, weights: DetectorWeights) -> tuple[CocoSet, bool]:
    """The pictures to train on, and whether a detector's last layers are for their classes."""
    train = open_coco(
        expanded(options.data_path, "--data_path"),
        expanded(options.annotations, "--annotations"),
        training=True,
        keep_empty=options.keep_empty,
        most=options.max_pictures,
    )
    known = weights.classes
    if known is None or not known.certain:
        return train, known is not None and len(known.names) == len(train.classes)
    if train.used_classes() <= set(known.names):
        return train.with_classes(known.names), True
    return train, False


def _open_val(
    options: DetectOptions, classes: list[str] | tuple[()], train: CocoSet | None = None
) -> CocoSet:
    """What is scored on; without annotations of its own, what is trained on."""
    folder = expanded(options.val_data_path or options.data_path, "--val_data_path")
    if options.val_annotations:
        return open_coco(folder, expanded(options.val_annotations, "--val_annotations"), classes=classes)
    val = open_coco(folder, expanded(options.annotations, "--annotations"), classes=classes)
    return val.only({each["id"] for each in train.pictures}) if train else val


def _create(
    options: DetectOptions, weights: DetectorWeights, num_classes: int, *, fresh: bool = False
) -> NamedDetector:
    named = create_detector(
        weights,
        num_classes,
        sides=chosen_sides(options.test_sides, weights.sides),
        fresh=fresh,
        arch=options.arch,
        drop_path=options.drop_path,
        regions=options.regions,
        score_threshold=options.score_threshold,
        key=options.checkpoint_key,
        seed=options.seed,
    )
    named.network.set_grad_checkpointing(options.grad_checkpointing)
    return named


def _length(options: DetectOptions, count: int) -> Length:
    each, rest = divmod(options.batch_size, distributed.world_size())
    if rest or not each:
        raise UserError(
            f"--batch_size {options.batch_size}: must be a multiple of the {distributed.world_size()} processes"
        )
    return of_epochs(count, each, options.length.epochs)


def _views(options: DetectOptions) -> DetectionViews:
    return DetectionViews(
        short_sides=options.short_sides,
        long_side=options.long_side,
        cut_share=options.cut_share,
        cut_from=options.cut_from,
        cut_sides=options.cut_sides,
        flip_share=0.5 if options.flip else 0.0,
    )


def _facts(
    options: DetectOptions, weights: DetectorWeights, train: CocoSet, keeps_head: bool
) -> dict[str, Any]:
    """What `open_weights` finds in a checkpoint."""
    known = weights.classes
    ids = known.ids if keeps_head and known and known.certain else list(train.category_ids.values())
    sides = chosen_sides(options.test_sides, weights.sides)
    return {FACTS_KEY: {"classes": train.classes, "ids": ids, "sides": list(sides)}}


def _opening(
    options: DetectOptions,
    machine: Machine,
    train: CocoSet,
    val: CocoSet,
    named: NamedDetector,
    length: Length,
) -> list[str]:
    sides = f"{min(options.short_sides)} to {max(options.short_sides)}"
    scored = f"{len(val):,} to evaluate on" if options.val_annotations else "evaluated on the same"
    return [
        f"pictures:  {len(train):,} to train on, with {train.object_count():,} objects of {len(train.classes)} "
        f"classes; {scored}",
        *(
            f"           {line}"
            for line in (*train.left_out, *(val.left_out if options.val_annotations else ()))
        ),
        f"network:   {named}",
        f"steps:     {length.steps:,} of {length.global_batch} pictures with short sides of {sides} px, in "
        f"{length.rounds} epochs",
        f"computing: {machine.device}, {machine.precision}",
        f"output:    {Path(options.output_dir).resolve()}",
    ]


def _finish(
    options: DetectOptions,
    machine: Machine,
    named: NamedDetector,
    evaluation: Evaluation,
    measures: Mapping[str, Any],
    name: str,
    facts: Mapping[str, Any],
) -> None:
    """The measures as a table and in results.json."""
    print(*table(measures), sep="\n")
    for broken in evaluation.broken:
        print(f"left out: {broken}")
    result = {
        **measures,
        "pictures": len(evaluation.truth) - len(evaluation.broken),
        "arch": named.arch,
        "network_sha256": tensors_sha256(named.network),
        "broken": evaluation.broken,
        "left_out": evaluation.truth.left_out,
        "device": distributed.describe(machine.device),
        "options": asdict(options),
        **facts,
    }
    print(f"written to {write_results(Path(options.output_dir), name, result)}")
