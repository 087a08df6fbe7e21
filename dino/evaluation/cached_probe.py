"""The fast protocol of linear accuracy: several classifiers on features that were extracted once."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino.evaluation.kinds import CLASS_TOKEN, LAST_BLOCKS, LAST_BLOCKS_COUNT, PATCH_MEAN
from dino.evaluation.probe_result import ProbeResult

if TYPE_CHECKING:
    import torch

    from dino.evaluation.extraction import Features
    from dino.evaluation.labelled_features import LabelledFeatures

GRID = "SGD, cached features"
LOGISTIC = "logistic regression, cached features"


class Row(NamedTuple):
    """One number and where it is from."""

    protocol: str
    features: str
    result: ProbeResult


def inputs(features: "Features") -> dict[str, np.ndarray]:
    """What the classifiers are given, each (n, D)."""
    given = {"CLS": features[CLASS_TOKEN]}
    if LAST_BLOCKS in features.rows:
        given[f"CLS of {LAST_BLOCKS_COUNT} blocks"] = features[LAST_BLOCKS]
    mean = features[PATCH_MEAN]
    with_mean = {f"{name} + patch mean": np.concatenate([rows, mean], axis=1) for name, rows in given.items()}
    return given | with_mean


def probe(
    sets: "LabelledFeatures",
    *,
    epochs: int,
    device: "torch.device",
    precision: str,
    seed: int,
    logistic_max: int,
) -> list[Row]:
    """Train on train, choose on a part of it, score on val: a grid of linear heads, then logistic regression.

    Args:
        epochs: of the grid.
        precision: of the heads' products.
        logistic_max: with more training pictures there is no logistic regression.
    """
    from dino.evaluation.linear_grid import grid_accuracy
    from dino.evaluation.logistic import logistic_accuracy

    train, val = inputs(sets.train), inputs(sets.val)
    grid = grid_accuracy(
        train,
        sets.train_labels,
        val,
        sets.val_labels,
        num_classes=len(sets.classes),
        epochs=epochs,
        device=device,
        precision=precision,
        seed=seed,
        progress="linear heads",
    )
    rows = [Row(GRID, name, result) for name, result in grid.items()]
    if len(sets.train_labels) <= logistic_max:
        for name in train:
            title = f"logistic, {name}"
            result = logistic_accuracy(
                train[name], sets.train_labels, val[name], sets.val_labels, seed=seed, progress=title
            )
            rows.append(Row(LOGISTIC, name, result))
    return rows


def probe_few_shots(
    sets: "LabelledFeatures", *, shots: Sequence[int], draws: int, seed: int
) -> list[dict[str, Any]]:
    """Accuracies with few training pictures of each class, as plain values; one entry per input and number."""
    from dino.evaluation.few_shot import few_shot_accuracy

    train, val = inputs(sets.train), inputs(sets.val)
    entries: list[dict[str, Any]] = []
    for name in train:
        results = few_shot_accuracy(
            train[name],
            sets.train_labels,
            val[name],
            sets.val_labels,
            shots=shots,
            draws=draws,
            seed=seed,
            progress=f"few shots, {name}",
        )
        entries += [
            {"protocol": f"{LOGISTIC}, {count} per class", "features": name, **asdict(result)}
            for count, result in results.items()
        ]
    return entries


def plain(row: Row) -> dict[str, Any]:
    """For the table and for `results.json`."""
    numbers = {
        name: getattr(row.result, name) for name in ("top1", "top5", "balanced", "held_out", "at_edge")
    }
    chosen = {row.result.chosen_name: row.result.chosen}
    return {"protocol": row.protocol, "features": row.features, "chosen": chosen, **numbers}
