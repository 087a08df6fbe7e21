"""Over several processes see test_faults.py."""

import copy
import math

import pytest
import torch

from dino.nonfinite import first_nonfinite_module, source_of_nonfinite
from tests.dino.test_distillation import create_networks, create_views


@pytest.mark.parametrize(
    "name", ["backbone.patch_embed.proj.0.0", "backbone.blocks.1.mlp.fc1", "head.mlp.2", "head.last_layer"]
)
def test_the_first_module_that_is_not_finite_is_named(name):
    student, _ = create_networks()
    module = student.get_submodule(name)
    weight = module.weight_v if name == "head.last_layer" else module.weight
    assert first_nonfinite_module(student, create_views()) is None
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    before = copy.deepcopy(student.state_dict())
    assert first_nonfinite_module(student, create_views())[1] == name
    assert all(torch.equal(v, before[n]) for n, v in student.state_dict().items() if "running" in n)


def test_of_several_parts_the_one_in_which_it_comes_first_tells_where_it_began():
    student, _ = create_networks()
    healthy, poisoned = create_views(), create_views()
    assert source_of_nonfinite(student, [healthy]).startswith("every output of the student is finite")
    poisoned[0][0] = math.inf
    said = source_of_nonfinite(student, [healthy, poisoned])
    assert (
        said == "the first module of the student whose output is not finite is backbone.patch_embed.proj.0.0"
    )
