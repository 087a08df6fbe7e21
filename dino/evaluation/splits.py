"""Which training pictures fit a classifier, and which choose its settings; draws of few pictures per class."""

from collections.abc import Iterator

import numpy as np

from dino.runtime.options import UserError

_HELD_OUT = 0.2

# An accuracy on this many is known to a quarter of a percent; more pictures are of more use in the fit.
_MOST_HELD_OUT = 50_000


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a training set, so that settings are chosen on pictures that were not fitted.

    A fifth is held out class by class, at most `_MOST_HELD_OUT` in all. Every class keeps a picture to fit, so a
    class of one holds out none; with only such classes nothing is held out.

    Args:
        labels: (n,) int.

    Returns:
        indices to fit and to hold out, both rising; together they are all.
    """
    held_out = [
        order[: min(max(1, round(_HELD_OUT * len(order))), len(order) - 1)]
        for order in _shuffled_classes(labels, seed)
    ]
    chosen = np.concatenate([np.empty(0, np.int64), *held_out])
    if len(chosen) > _MOST_HELD_OUT:
        chosen = np.random.default_rng(seed).permutation(chosen)[:_MOST_HELD_OUT]
    fitted = np.ones(len(labels), bool)
    fitted[chosen] = False
    return np.flatnonzero(fitted), np.flatnonzero(~fitted)


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices (m,), rising, of `shots` pictures of every class; of a class that has fewer, all.

    With the same seed, a draw of fewer shots is a part of a draw of more.

    Args:
        labels: (n,) int.

    Raises:
        UserError: shots < 1.
    """
    if shots < 1:
        raise UserError(f"a few-shot draw needs 1 picture of every class or more, got {shots}")
    return np.sort(np.concatenate([order[:shots] for order in _shuffled_classes(labels, seed)]))


def _shuffled_classes(labels: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The indices of one class after the other, each class in an order by chance."""
    generator = np.random.default_rng(seed)
    by_class = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[by_class])) + 1
    for pictures in np.split(by_class, starts):
        yield generator.permutation(pictures)
