"""The command for linear accuracy of frozen features, by several protocols.

python eval_linear.py --pretrained_weights checkpoint.pth --data_path photos/
python eval_linear.py --protocol original --pretrained_weights checkpoint.pth --data_path photos/
python eval_linear.py --evaluate --arch vit_small --data_path imagenet/
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.evaluation.cached_probe import plain, probe, probe_few_shots
from dino.evaluation.evaluation_options import FeatureOptions
from dino.evaluation.labelled_features import labelled_features
from dino.evaluation.probe_table import probe_table
from dino.evaluation.results import check_results, read_results, write_results
from dino.evaluation.subject import Subject, create_subject, resolve_options, say
from dino.runtime.options import UserError, command, option

if TYPE_CHECKING:
    from dino.evaluation.linear_classifier import Scores
    from dino.runtime.pictures import Pictures

ORIGINAL = "SGD, random crops (DINO's)"
TRAINED = "trained classifier"

# Results of these names share a table.
_FAST, _ORIGINAL, _EVALUATED = "linear, fast", "linear, original", "linear, evaluated"


@dataclass(frozen=True)
class LinearOptions(FeatureOptions):
    n_last_blocks: int = option(
        4, "Class tokens of how many last blocks, for the original protocol of a ViT; ViT-S 4, ViT-B 1."
    )
    avgpool_patchtokens: bool = option(
        False,
        "Also the mean of the patch tokens, for the original protocol of a ViT; ViT-S false, ViT-B true.",
    )
    epochs: int = option(100, "Passes over the training pictures, or over their features.")
    lr: float = option(
        0.001, "Learning rate of the original protocol at the beginning, for 256 pictures per step."
    )
    val_freq: int = option(
        1, "Epochs from one look at the val pictures to the next, in the original protocol."
    )
    num_labels: int = option(
        0, "Outputs of the original protocol's classifier; 0 = as many as the data has classes."
    )
    evaluate: bool = option(False, "Only score a trained classifier, of --linear_weights.")
    linear_weights: str = option(
        "",
        "Trained classifier for --evaluate: file or URL. Empty = the published one of published weights, else "
        "checkpoint.pth.tar of --output_dir.",
    )
    protocol: str = option(
        "fast",
        "fast = on cached features, a grid of learning rates at once, and logistic regression; original = DINO's: "
        "random crops through the backbone every epoch.",
        choices=("fast", "original"),
    )
    shots: tuple[int, ...] = option(
        (), "Fast protocol: also with only so many training pictures per class, such as 1 5 10. Empty = off."
    )
    draws: int = option(5, "Random draws of the pictures for each number of --shots.")
    logistic_max: int = option(
        100_000, "With more training pictures no logistic regression, which would take hours; 0 = never."
    )


def run(options: LinearOptions) -> None:
    counts = ("epochs", "n_last_blocks", "draws", "val_freq")
    wrong = [name for name in counts if getattr(options, name) < 1]
    if wrong or min(options.shots, default=1) < 1:
        raise UserError(f"--{(*wrong, 'shots')[0]} must be 1 or more")
    if not 0 < options.lr < math.inf:
        raise UserError(f"--lr must be above 0 and finite, got {options.lr}")
    check_results(Path(options.output_dir))
    if options.evaluate:
        _evaluate(options)
    elif options.protocol == "original":
        _train(options)
    else:
        _probe(options)


def _probe(options: LinearOptions) -> None:
    """The fast protocol, on features that are extracted once."""
    from dino.runtime.distributed import pick_device, pick_precision

    sets = labelled_features(options)
    if sets is None:
        return  # the main process does the rest
    _check_labels(options, len(sets.classes))
    device = pick_device(options.device, options.local_rank)
    rows = probe(
        sets,
        epochs=options.epochs,
        device=device,
        precision=pick_precision(options.precision, device),
        seed=options.seed,
        logistic_max=options.logistic_max,
    )
    if len(sets.train_labels) > options.logistic_max:
        print(
            f"no logistic regression: {len(sets.train_labels)} training pictures, --logistic_max allows fewer"
        )
    few_shot = (
        probe_few_shots(sets, shots=options.shots, draws=options.draws, seed=options.seed)
        if options.shots
        else []
    )
    chosen = max(rows, key=lambda row: row.result.held_out or 0.0)
    results = {"results": [*map(plain, rows), *few_shot], "chosen": plain(chosen)}
    confused = (sets.val_labels, chosen.result.predictions, sets.classes)
    _finish(options, _FAST, {**results, **sets.facts}, *confused)
    if chosen.result.held_out is None:
        print(
            "no class has a second training picture to hold out: the settings are defaults, and none is best"
        )
    else:
        print(f"best on the held-out part of train: {chosen.protocol}, {chosen.features}")


def _train(options: LinearOptions) -> None:
    """The original protocol: a classifier trained through the backbone."""
    from dino.evaluation.labelled_sets import class_numbers, open_train_and_val
    from dino.evaluation.linear_classifier import ProbedTokens
    from dino.evaluation.linear_training import LinearTraining, train_classifier
    from dino.runtime import distributed

    device = distributed.pick_device(options.device, options.local_rank)
    with distributed.processes(device, dist_url=options.dist_url):
        with distributed.together():
            tokens_of = ProbedTokens(options.n_last_blocks, options.avgpool_patchtokens)
            train, val = open_train_and_val(options.data_path, say=say)
            _check_labels(options, len(train.classes))
            subject = create_subject(options, device)
        train.as_stored = val.as_stored = options.as_stored
        say(f"Data loaded with {len(train)} train and {len(val)} val imgs.")
        settings = LinearTraining(
            epochs=options.epochs,
            lr=options.lr,
            batch_size=options.batch_size_per_gpu,
            val_freq=options.val_freq,
            seed=options.seed,
            num_workers=subject.extractor.num_workers,
        )
        trained = train_classifier(
            subject.extractor,
            tokens_of,
            train,
            val,
            class_numbers(val.classes, train.classes),
            settings,
            Path(options.output_dir),
            num_classes=options.num_labels or len(train.classes),
            backbone_sha256=subject.origin.backbone_sha256,
            say=say,
        )
        if not distributed.is_main():
            return
    for broken in (*trained.broken, *trained.last.broken):
        print(f"left out: {broken}")
    print(f"Top-1 test accuracy: {trained.best_top1:.1f}")
    result = {
        "protocol": ORIGINAL,
        "features": tokens_of.describe(subject.extractor.backbone),
        "chosen": {"lr": options.lr},
        "best_top1": trained.best_top1,
        **_plain(trained.last),
    }
    facts = {**_facts(options, subject, {"train": train, "val": val}), "broken": trained.broken}
    confused = (trained.last.labels, trained.last.predictions, train.classes)
    _finish(options, _ORIGINAL, {"results": [result], **facts}, *confused)


def _evaluate(options: LinearOptions) -> None:
    """Score a classifier that was trained before, published or ours."""
    from dino.evaluation.labelled_sets import open_val
    from dino.evaluation.linear_classifier import ProbedTokens, load_classifier, outputs_of, score
    from dino.runtime import distributed

    device = distributed.pick_device(options.device, options.local_rank)
    with distributed.processes(device, dist_url=options.dist_url):
        with distributed.together():
            tokens_of = ProbedTokens(options.n_last_blocks, options.avgpool_patchtokens)
            val, classes = open_val(options.data_path)
            _check_labels(options, len(classes))
            val.as_stored = options.as_stored
            source = _trained_classifier(options)
            subject = create_subject(options, device)
            classifier = load_classifier(source, tokens_of.width(subject.extractor)).to(device)
            numbers = outputs_of(
                classifier.linear.out_features,
                classifier.classes,
                val.classes,
                classes,
                num_labels=options.num_labels,
            )
        say(f"classifier of {classifier.linear.out_features} classes from {source}")
        scores = score(subject.extractor, tokens_of, classifier, val, numbers, progress="val pictures")
        if not distributed.is_main():
            return
    for broken in scores.broken:
        print(f"left out: {broken}")
    five = "" if scores.top5 is None else f"Acc@5 {scores.top5:.3f} "
    print(f"* Acc@1 {scores.top1:.3f} {five}loss {scores.loss:.3f}")
    print(f"Accuracy of the network on the {len(scores.labels)} test images: {scores.top1:.1f}%")
    features = tokens_of.describe(subject.extractor.backbone)
    result = {"protocol": TRAINED, "features": features, "linear_weights": source, **_plain(scores)}
    facts = {**_facts(options, subject, {"val": val}), "broken": scores.broken}
    names = {number: name for number, name in zip(numbers.tolist(), val.classes, strict=True)}
    listed = [names.get(number, str(number)) for number in range(classifier.linear.out_features)]
    _finish(options, _EVALUATED, {"results": [result], **facts}, scores.labels, scores.predictions, listed)


def _trained_classifier(options: LinearOptions) -> str:
    """File or URL of the classifier to score."""
    from dino.evaluation.linear_training import NAME
    from xcit.zoo import DINO

    if options.linear_weights:
        return options.linear_weights
    weights = resolve_options(options).pretrained_weights
    if weights in DINO:
        return str(DINO[weights].linear_url)
    own = Path(options.output_dir, NAME)
    if own.exists():
        return str(own)
    raise UserError(
        f"--evaluate needs a trained classifier: there is none published for {weights}, and no {own}; "
        "name one with --linear_weights"
    )


def _check_labels(options: LinearOptions, classes: int) -> None:
    if options.num_labels and options.num_labels < classes:
        raise UserError(
            f"--num_labels {options.num_labels}: the data has {classes} classes; leave it out to have as many"
        )


def _facts(options: LinearOptions, subject: Subject, sets: "Mapping[str, Pictures]") -> dict[str, Any]:
    from dino.runtime.fingerprint import fingerprint

    return {
        **subject.facts,
        "data_path": options.data_path,
        "data_sha256": {name: fingerprint(pictures).content for name, pictures in sets.items()},
        "pictures": {name: len(pictures) for name, pictures in sets.items()},
        "classes": next(iter(sets.values())).classes,
    }


def _plain(scores: "Scores") -> dict[str, Any]:
    return {name: getattr(scores, name) for name in ("top1", "top5", "balanced", "loss")}


def _finish(
    options: LinearOptions,
    name: str,
    entry: Mapping[str, Any],
    labels: np.ndarray,
    predictions: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Confusion matrix, results, and one table of what all protocols have said of this backbone on these pictures."""
    from dino.evaluation.confusion import confusion_counts, write_confusion

    folder = Path(options.output_dir)
    # A classifier may have more outputs than the data has classes.
    outputs = max(len(classes), int(predictions.max()) + 1)
    names = [*classes, *(str(number) for number in range(len(classes), outputs))]
    write_confusion(confusion_counts(labels, predictions, outputs), names, folder / "confusion")
    print(f"confusion matrix: {folder / 'confusion.png'}, {folder / 'confusion.csv'}")
    print(f"written to {write_results(folder, name, entry)}")
    stored = read_results(folder)
    entries: list[Any] = []
    for other in (stored.get(key) for key in (_FAST, _ORIGINAL, _EVALUATED)):
        if isinstance(other, dict) and _is_of_the_same(other, entry):
            entries += other["results"]
    print(*probe_table(entries), sep="\n")


def _is_of_the_same(other: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether two results are of one backbone and of the same pictures, prepared alike."""
    same = all(other.get(fact) == entry[fact] for fact in ("backbone_sha256", "preprocessing"))
    return same and other["data_sha256"]["val"] == entry["data_sha256"]["val"]


def main(prog: str = "dino-linear") -> None:
    command(LinearOptions, run, prog=prog, description="Linear accuracy of frozen features.")


if __name__ == "__main__":
    main()
