"""A pre-trained backbone against its own random start: k-NN and linear accuracy before and after, in one table.

python -m dino.evaluation.compare --pretrained_weights runs/demo/checkpoint.pth --data_path demo
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino.evaluation.cached_probe import inputs, probe
from dino.evaluation.evaluation_options import FeatureOptions
from dino.evaluation.knn import check_votes, knn_accuracy
from dino.evaluation.labelled_features import extract_both
from dino.evaluation.paired import paired_difference
from dino.evaluation.results import check_results, write_results
from dino.evaluation.subject import create_subject, resolve_options
from dino.runtime.options import RANDOM, UserError, command, option

_LOGISTIC_MAX = 20_000


@dataclass(frozen=True)
class CompareOptions(FeatureOptions):
    image_size: int = option(
        0, "Side in pixels of what the backbone sees; 0 = that of the run's own k-NN, or 224."
    )
    k: int = option(20, "Neighbours that vote.")
    epochs: int = option(100, "Passes of the linear heads over the features.")


@dataclass(frozen=True, eq=False)
class Measure:
    """An accuracy in percent, and which pictures were right (n,) bool."""

    accuracy: float
    correct: np.ndarray


def run(options: CompareOptions) -> None:
    from dino.runtime import distributed
    from dino.runtime.named_backbone import stored_options

    check_votes((options.k,))
    if options.epochs < 1:
        raise UserError(f"--epochs must be 1 or more, got {options.epochs}")
    check_results(Path(options.output_dir))
    device = distributed.pick_device(options.device, options.local_rank)
    with distributed.processes(device, dist_url=options.dist_url):
        with distributed.together():
            if options.pretrained_weights in ("", RANDOM):
                raise UserError(
                    "--pretrained_weights: name the checkpoint that is compared with its random start"
                )
            stored = stored_options(options.pretrained_weights)
            size = options.image_size or stored.get("eval_size") or stored.get("global_crops_size") or 224
            # Also the architecture and patch size that the weights are for, which random ones cannot say.
            after = dataclasses.replace(
                resolve_options(options), image_size=int(size), seed=int(stored.get("seed", options.seed))
            )
            trained = create_subject(after, device)
            before = dataclasses.replace(after, pretrained_weights=RANDOM)
            random = create_subject(before, device)
        measures, facts = [], {}
        for settings, subject in ((before, random), (after, trained)):
            sets = extract_both(settings, subject)
            if sets is not None:
                measures.append(_measure(options, sets, device))
                facts = sets.facts
        if not distributed.is_main():
            return
    rows = [
        (name, start, end, paired_difference(end.correct, start.correct)[1])
        for (name, start), end in zip(measures[0].items(), measures[1].values(), strict=True)
    ]
    _print(rows)
    results = [
        {"measure": name, "random": start.accuracy, "trained": end.accuracy, "p": p_value}
        for name, start, end, p_value in rows
    ]
    print(f"written to {write_results(Path(options.output_dir), 'compare', {'results': results, **facts})}")


def _measure(options: CompareOptions, sets: Any, device: Any) -> dict[str, Measure]:
    from dino.runtime.distributed import pick_precision

    measures = {}
    train, val = inputs(sets.train), inputs(sets.val)
    for name in train:
        result = knn_accuracy(
            train[name],
            sets.train_labels,
            val[name],
            sets.val_labels,
            ks=(options.k,),
            device=device,
            progress=f"k-NN, {name}",
        )[options.k]
        measures[f"{options.k}-NN, {name}"] = Measure(result.top1, result.correct)
    rows = probe(
        sets,
        epochs=options.epochs,
        device=device,
        precision=pick_precision(options.precision, device),
        seed=options.seed,
        logistic_max=_LOGISTIC_MAX,
    )
    for protocol, name, probed in rows:
        kind = "logistic regression" if protocol.startswith("logistic") else "linear, SGD"
        measures[f"{kind}, {name}"] = Measure(probed.top1, probed.correct)
    return measures


def _print(rows: list[tuple[str, Measure, Measure, float]]) -> None:
    """p: how likely so large a difference is by chance."""
    width = max(len(name) for name, *_ in rows)
    print(f"{'top-1 accuracy, %':<{width}}  {'random start':>12} {'trained':>8} {'p (McNemar)':>12}")
    for name, start, end, p_value in rows:
        print(f"{name:<{width}}  {start.accuracy:12.1f} {end.accuracy:8.1f} {p_value:12.0e}")


def main(prog: str = "python -m dino.evaluation.compare") -> None:
    command(
        CompareOptions,
        run,
        prog=prog,
        description="A pre-trained backbone against its own random start.",
    )


if __name__ == "__main__":
    main()
