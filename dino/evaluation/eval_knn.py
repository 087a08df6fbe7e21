"""The command for k-NN accuracy of frozen features; the vote is in `dino.evaluation.knn`.

python eval_knn.py --pretrained_weights checkpoint.pth --data_path imagenet/
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino.evaluation.evaluation_options import FeatureOptions
from dino.evaluation.kinds import CLASS_TOKEN, PATCH_MEAN
from dino.evaluation.knn import KnnResult, check_votes, knn_accuracy
from dino.evaluation.labelled_features import labelled_features
from dino.evaluation.results import check_results, write_results
from dino.evaluation.scoring import per_class_accuracy
from dino.runtime.files import make_writable
from dino.runtime.options import command, option


@dataclass(frozen=True)
class KnnOptions(FeatureOptions):
    nb_knn: tuple[int, ...] = option(
        (10, 20, 100, 200), "Numbers of neighbours that vote, one result for each."
    )
    temperature: float = option(0.07, "A neighbour votes with the weight exp(cosine / temperature).")
    use_cuda: bool = option(True, "false = everything on the CPU, whatever --device says.")
    dump_features: str = option(
        "", "Folder to write the features to, as DINO's eval_knn.py does. Empty = off."
    )
    load_features: str = option("", "Folder to read such features from, instead of pictures. Empty = off.")
    kind: str = option(
        CLASS_TOKEN,
        "Which features: the class token, as DINO does, or the mean of the patch tokens.",
        choices=(CLASS_TOKEN, PATCH_MEAN),
    )
    per_class: bool = option(False, "Print and record the accuracy of every class.")


@dataclass(frozen=True, eq=False)
class _Sets:
    """Rows (n, C) and labels (n,) of those that vote and those that are judged."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    one_set: bool
    classes: list[str]
    facts: dict[str, Any]


def run(options: KnnOptions) -> None:
    from dino.runtime.distributed import pick_device

    if not options.use_cuda:
        options = dataclasses.replace(options, device="cpu")
    check_votes(options.nb_knn, options.temperature)
    check_results(Path(options.output_dir))
    sets = _load(options) if options.load_features else _extract(options)
    if sets is None:
        return  # the main process does the rest
    results = knn_accuracy(
        sets.train,
        sets.train_labels,
        sets.test,
        sets.test_labels,
        ks=options.nb_knn,
        temperature=options.temperature,
        exclude_self=sets.one_set,
        device=pick_device(options.device, options.local_rank),
        progress="k-NN",
    )
    _print(results, len(sets.train) - sets.one_set)
    entry = {
        "protocol": f"k-NN, votes weighted by exp(cosine / {options.temperature:g})"
        + (", leave one out" if sets.one_set else ""),
        "features": options.kind,
        "results": [
            {
                "k": k,
                "neighbours": each.neighbours,
                "top1": each.top1,
                "top5": each.top5,
                "balanced": each.balanced,
            }
            for k, each in results.items()
        ],
        **sets.facts,
    }
    if options.per_class:
        entry["per_class"] = _per_class(results, sets)
    print(f"written to {write_results(Path(options.output_dir), 'knn', entry)}")


def _load(options: KnnOptions) -> _Sets | None:
    from dino.evaluation.feature_files import load_features
    from dino.runtime import distributed

    device = distributed.pick_device(options.device, options.local_rank)
    with distributed.processes(device, dist_url=options.dist_url):
        if not distributed.is_main():
            return None
    train, train_labels, test, test_labels = load_features(options.load_features)
    # Any integers will do as labels: they need not be few, or begin at 0.
    classes, numbers = np.unique(np.concatenate([train_labels, test_labels]), return_inverse=True)
    return _Sets(
        train,
        numbers[: len(train)],
        test,
        numbers[len(train) :],
        one_set=False,
        classes=classes.astype(str).tolist(),
        facts={"features": "loaded", "loaded_features": options.load_features},
    )


def _extract(options: KnnOptions) -> _Sets | None:
    from dino.evaluation.feature_files import dump_features

    if options.dump_features:
        make_writable(Path(options.dump_features), "--dump_features")
    sets = labelled_features(options, one_set_will_do=True)
    if sets is None:
        return None
    train, test = sets.train[options.kind], sets.val[options.kind]
    if options.dump_features:
        dump_features(options.dump_features, train, sets.train_labels, test, sets.val_labels)
    return _Sets(train, sets.train_labels, test, sets.val_labels, sets.one_set, sets.classes, sets.facts)


def _print(results: dict[int, KnnResult], available: int) -> None:
    clamped = [k for k, result in results.items() if result.neighbours < k]
    if clamped:
        listed = " and ".join(map(str, clamped))
        print(f"--nb_knn {listed}: there are only {available} training pictures, so all of them vote")
    for k, result in results.items():
        print(f"{k}-NN classifier result: Top1: {result.top1}, Top5: {result.top5}")
    balanced = ", ".join(f"{k}-NN {result.balanced:.2f}" for k, result in results.items())
    print(f"balanced accuracy (all classes weigh the same): {balanced}")


def _per_class(results: dict[int, KnnResult], sets: _Sets) -> dict[str, dict[str, float]]:
    counts = np.bincount(sets.test_labels, minlength=len(sets.classes))
    of_k = {k: per_class_accuracy(result.correct, sets.test_labels) for k, result in results.items()}
    width = max(len(name) for name in sets.classes)
    print(f"{'class':{width}} {'pictures':>9} " + " ".join(f"{f'{k}-NN':>7}" for k in of_k))
    table = {}
    for label in np.flatnonzero(counts).tolist():
        accuracies = {str(k): float(of[label]) for k, of in of_k.items()}
        numbers = " ".join(f"{accuracy:7.2f}" for accuracy in accuracies.values())
        print(f"{sets.classes[label]:{width}} {counts[label]:>9} {numbers}")
        table[sets.classes[label]] = accuracies
    return table


def main(prog: str = "dino-knn") -> None:
    command(KnnOptions, run, prog=prog, description="k-NN accuracy of frozen features.")


if __name__ == "__main__":
    main()
