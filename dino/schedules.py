"""Rates by step: every schedule is an array, so that it can be plotted, tested, and resumed with one number.

DINO, section 3.2 and appendix: linear warm-up then cosine for the learning rate, cosine for weight decay and
for the teacher's momentum, linear warm-up by epoch for the teacher's temperature.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Schedule: TypeAlias = NDArray[np.float64]


def cosine(start: float, end: float, steps: int, *, warmup_steps: int = 0) -> Schedule:
    """Linear from 0 to `start` over `warmup_steps` (both ends included), then half a cosine down to `end`.

    Returns:
        (steps,) values; `warmup_steps` beyond `steps` are cut off.
    """
    warmup = np.linspace(0.0, start, warmup_steps)
    remaining = max(steps - warmup_steps, 0)
    phase = np.pi * np.arange(remaining) / max(remaining, 1)
    decay = end + 0.5 * (start - end) * (1.0 + np.cos(phase))
    return np.concatenate([warmup, decay])[:steps]


def teacher_temperature(
    warmup: float, final: float, *, warmup_epochs: int, epochs: int, steps_per_epoch: int
) -> Schedule:
    """One temperature per epoch, linear from `warmup` to `final` (both included), repeated for its steps.

    Returns:
        (epochs * steps_per_epoch,) values.
    """
    ramp = np.linspace(warmup, final, warmup_epochs)
    constant = np.full(max(epochs - warmup_epochs, 0), final)
    return np.repeat(np.concatenate([ramp, constant])[:epochs], steps_per_epoch)
