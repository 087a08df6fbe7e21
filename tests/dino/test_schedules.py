import math

import numpy as np
import pytest

from dino.schedules import cosine, teacher_temperature


def naive_cosine(step, start, end, steps, warmup):
    """Linear over the warm-up with both ends included, then the half cosine over what is left."""
    if step < warmup:
        return start * step / (warmup - 1) if warmup > 1 else 0.0
    phase = (step - warmup) / (steps - warmup)
    return end + (start - end) * (1 + math.cos(math.pi * phase)) / 2


@pytest.mark.parametrize(
    ("start", "end", "steps", "warmup"),
    [(5e-4, 1e-6, 20, 5), (0.04, 0.4, 7, 0), (0.996, 1.0, 1, 0), (1.0, 0.0, 6, 1), (1.0, 0.1, 4, 4)],
)
def test_cosine_equals_the_naive_formula_at_every_step(start, end, steps, warmup):
    schedule = cosine(start, end, steps, warmup_steps=warmup)
    expected = [naive_cosine(step, start, end, steps, warmup) for step in range(steps)]
    assert schedule.dtype == np.float64
    np.testing.assert_allclose(schedule, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (4, 1.0), (5, 1.0), (10, 0.55), (14, 0.122)])
def test_the_peak_is_reached_on_the_last_step_of_the_warm_up_and_once_more_after_it(step, expected):
    assert cosine(1.0, 0.1, 15, warmup_steps=5)[step] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_warm_up_longer_than_the_run_is_cut_off(steps):
    np.testing.assert_allclose(cosine(1.0, 0.0, steps, warmup_steps=5), [0, 0.25, 0.5][:steps])


@pytest.mark.parametrize(
    ("warmup_epochs", "epochs", "expected"),
    [
        (0, 3, [0.07, 0.07, 0.07]),
        (1, 3, [0.04, 0.07, 0.07]),
        (3, 5, [0.04, 0.055, 0.07, 0.07, 0.07]),
        (4, 2, [0.04, 0.05]),
    ],
)
def test_teacher_temperature_is_constant_within_an_epoch(warmup_epochs, epochs, expected):
    temperatures = teacher_temperature(
        0.04, 0.07, warmup_epochs=warmup_epochs, epochs=epochs, steps_per_epoch=3
    )
    np.testing.assert_allclose(temperatures.reshape(-1, 3), np.array([expected] * 3).T)
