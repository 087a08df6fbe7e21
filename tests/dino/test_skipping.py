"""A step that is not finite is as if it had not been, and a GPU is not asked whether it was."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dino import distillation
from dino.distillation import follow_by
from dino.teacher import follow
from tests.dino.test_distillation import (
    RATES,
    create_distillation,
    create_networks,
    create_views,
    state_of,
)


def poisoned(views):
    views[3][1] = math.nan
    return views


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("bad", [{0}, {1, 2}])
def test_a_run_with_skipped_steps_is_the_run_without_them(bad, optimizer):
    disturbed, undisturbed = (create_distillation(optimizer=optimizer) for _ in range(2))
    for step in range(4):
        views = create_views(step)
        if step in bad:
            assert not disturbed.step(poisoned(views), RATES).finite
            continue
        results = [each.step(views, RATES) for each in (disturbed, undisturbed)]
        assert results[0].measures == results[1].measures
    found, expected = state_of(disturbed), state_of(undisturbed)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_a_teacher_follows_by_a_weight_as_by_a_momentum():
    student, teacher = create_networks()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    student.load_state_dict(student.state_dict())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    follow_by(torch.tensor(0.0), teacher, student)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    follow_by(torch.tensor(1 - 0.9), teacher, student)
    found = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.load_state_dict(before)
    follow(teacher, student, 0.9)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


class AskedForNumberError(Exception):
    """The host wants to know a value: on a GPU it would wait for it."""


class NoQuestions(TorchDispatchMode):
    """Lets nothing through whose result, or its shape, the host must know."""

    ASKING = (
        "aten._local_scalar_dense",
        "aten.nonzero",
        "aten.masked_select",
        "aten.equal",
        "aten.is_nonzero",
    )

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        by_mask = any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for argument in arguments
            if isinstance(argument, list | tuple) and "index" in str(function)
            for index in argument
        )
        if by_mask or str(function).startswith(self.ASKING):
            raise AskedForNumberError(str(function))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("options", [{}, {"centering": "sinkhorn_knopp", "koleo_weight": 0.1}])
def test_a_gpu_is_asked_for_no_number_in_a_step(options, accumulate, monkeypatch):
    step_without_questions(monkeypatch, accumulate=accumulate, **options)


def test_sgd_asks_whether_to_step(monkeypatch):
    with pytest.raises(AskedForNumberError):
        step_without_questions(monkeypatch, optimizer="sgd")


def step_without_questions(monkeypatch, **options):
    """On a CPU, told that the answer is not at hand there either."""
    monkeypatch.setattr(
        distillation, "follow_if", lambda finite, *pair, momentum: follow_by(finite * (1 - momentum), *pair)
    )
    asked = create_distillation(**options)
    with NoQuestions():
        results = [
            asked.step(create_views(step), RATES._replace(hold_last_layer=step == 0)) for step in range(3)
        ]
    assert all(result.finite for result in results)
