"""Linear accuracy of frozen features at the learning rate that held-out training pictures choose (DINO, section 4.1).

A head is cheap on cached features, so a grid of learning rates is tried instead of one: which rate is good depends
on the backbone, and a comparison at one rate would be about the rate.

B = pictures of a block, R = rates, L = classes
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median_low

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dino.evaluation.linear_heads import Heads, Recipe, Standardise, train_heads
from dino.evaluation.probe_result import (
    Choice,
    ProbeResult,
    best_setting,
    check_classes,
    probe_result,
    rank_labels,
)
from dino.evaluation.scoring import check_features
from dino.evaluation.splits import hold_out
from dino.runtime.options import UserError

RATES = tuple(float(rate) for rate in np.logspace(-4, 0, 13))

# Bounds the memory beside the features: logits (rows, R, L).
_ROWS_PER_BLOCK = 1024

_NOT_FINITE = (
    "the linear heads did not stay finite (nan or infinity): try lower learning rates or --precision fp32"
)


def grid_accuracy(
    train: Mapping[str, np.ndarray],
    train_labels: np.ndarray,
    test: Mapping[str, np.ndarray],
    test_labels: np.ndarray,
    *,
    num_classes: int,
    rates: Sequence[float] = RATES,
    epochs: int = 100,
    batch_size: int = 256,
    device: torch.device,
    precision: str = "fp32",
    seed: int = 0,
    progress: str | None = None,
) -> dict[str, ProbeResult]:
    """A linear head on every input, its learning rate chosen on held-out pictures of the training set.

    SGD with momentum and without weight decay, the rate falling to 0 along a cosine; features are standardised by
    the training set's mean and deviation. The heads of all inputs and rates are trained together on the part that
    `splits.hold_out` leaves, and of equally good rates the middle one is chosen; then one head of every input is
    trained on all training pictures, and the test set is looked at once. Where nothing can be held out, the
    middle rate is taken.

    Args:
        train, test: by name of the input, features (n, C) of any float type; an `np.memmap` is read batch by batch.
        train_labels, test_labels: (n,) in [0, num_classes); a label of no training picture counts as wrong.
        rates: learning rates for batches of 256; they are used times batch_size / 256.
        precision: "fp32", "bf16" or "fp16" of the products with the weights; loss and update are float32.
        seed: of the held-out part, the first weights and the order of the pictures.
        progress: title of the progress bar, None = no bar.

    Returns:
        For every input, the head with the learning rate that was chosen for it.

    Raises:
        UserError: one class only, widths that differ, features that are not finite, an option out of its range,
            or heads that do not stay finite.
    """
    labels = np.asarray(train_labels, np.int64)
    _check(train, labels, test, num_classes, rates)
    if epochs < 1 or batch_size < 1:
        raise UserError(f"epochs and batch size must be 1 or more, got {epochs} and {batch_size}")
    fitted, held_out = hold_out(labels, seed)
    everything = np.arange(len(labels))
    recipe = Recipe(num_classes, epochs, batch_size, device, precision, seed)
    standardise = {name: Standardise(features, device) for name, features in train.items()}
    choices = dict.fromkeys(train, Choice(sorted(rates)[len(rates) // 2]))
    steps = recipe.steps(len(everything)) + (recipe.steps(len(fitted)) if len(held_out) else 0)
    with tqdm(total=steps, desc=progress, unit="batch", disable=progress is None, dynamic_ncols=True) as bar:
        trained = partial(
            train_heads, train, labels, standardise=standardise, recipe=recipe, advance=bar.update
        )
        if len(held_out):
            heads = trained(rows=fitted, rates=dict.fromkeys(train, tuple(rates)))
            for name, part in train.items():
                choices[name] = _choose(rates, _accuracies(heads[name], part, labels, held_out))
        heads = trained(rows=everything, rates={name: (choice.setting,) for name, choice in choices.items()})
    return {
        name: _test(heads[name], test[name], test_labels, np.unique(labels), choice)
        for name, choice in choices.items()
    }


def _check(
    train: Mapping[str, np.ndarray],
    labels: np.ndarray,
    test: Mapping[str, np.ndarray],
    num_classes: int,
    rates: Sequence[float],
) -> None:
    if not train or set(train) != set(test):
        raise ValueError(f"the same inputs to train and to test on, got {list(train)} and {list(test)}")
    for name, features in train.items():
        check_features(features, test[name])
    check_classes(labels)
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), got {labels.min()} to {labels.max()}")
    if not rates or not min(rates) > 0:
        raise UserError(f"learning rates must be above 0, got {', '.join(map(str, rates)) or 'none'}")


def _logits(heads: Heads, features: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Block by block of the rows: their indices (B,) and logits (B, R, L)."""
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        block = rows[start : start + _ROWS_PER_BLOCK]
        yield block, heads.logits(features[block])


def _accuracies(heads: Heads, features: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(R,) in percent on some rows; NaN for a head that did not stay finite."""
    right_R, finite_R = [], []
    for block, logits_BRL in _logits(heads, features, rows):
        labels_B = torch.from_numpy(labels[block]).to(logits_BRL.device)
        right_R.append((logits_BRL.argmax(dim=-1) == labels_B[:, None]).sum(dim=0).cpu())
        finite_R.append(logits_BRL.isfinite().all(dim=-1).all(dim=0).cpu())
    accuracy_R = 100 * torch.stack(right_R).sum(dim=0).numpy() / len(rows)
    return np.where(torch.stack(finite_R).all(dim=0).numpy(), accuracy_R, np.nan)


def _choose(rates: Sequence[float], accuracies: np.ndarray) -> Choice:
    if np.isnan(accuracies).all():
        raise UserError(_NOT_FINITE)
    # Of equal ones the middle, which is the farthest from rates that learn too little or diverge.
    return best_setting(dict(zip(rates, accuracies.tolist(), strict=True)), of_equal=median_low)


def _test(
    heads: Heads, features: np.ndarray, labels: np.ndarray, classes: np.ndarray, choice: Choice
) -> ProbeResult:
    """The result of the only head, whose answers are among the classes that it was trained on."""
    ranked = []
    for block, logits_BRL in _logits(heads, features, np.arange(len(labels))):
        if not logits_BRL.isfinite().all():
            raise UserError(_NOT_FINITE)
        ranked.append(rank_labels(logits_BRL[:, 0].cpu().numpy()[:, classes], classes, labels[block]))
    predictions, ranks = map(np.concatenate, zip(*ranked, strict=True))
    return probe_result(predictions, ranks, labels, num_classes=len(classes), choice=choice, chosen_name="lr")
