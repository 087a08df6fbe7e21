import pytest
import torch
from torch import nn

from dino.head import DinoHead
from dino.optimizer import (
    clip_gradients,
    create_optimizer,
    gradient_norms,
    parameter_groups,
    set_rates,
)
from dino.runtime.backbones import create_backbone
from dino.runtime.options import UserError


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), DinoHead(6, 8, hidden_dim=5, bottleneck_dim=3))


def train(network, optimizer, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        network(torch.randn(7, 4)).square().sum().backward()
        optimizer.step()


def test_biases_and_one_dimensional_parameters_are_not_decayed_and_frozen_ones_are_left_out():
    network = nn.ModuleDict(
        {
            "backbone": create_backbone("xcit_pico_3_p8"),
            "head": DinoHead(96, 8, hidden_dim=4, bottleneck_dim=2),
        }
    )
    names = {parameter: name for name, parameter in network.named_parameters()}
    decayed, plain = ({names[p] for p in group["params"]} for group in parameter_groups(network))
    assert decayed | plain == set(names.values()) - {"head.last_layer.weight_g"}
    assert {"backbone.cls_token", "backbone.blocks.0.attn.temperature", "head.mlp.0.weight"} <= decayed
    assert {"backbone.blocks.0.gamma1", "backbone.norm.weight", "head.mlp.0.bias"} <= plain
    assert parameter_groups(network)[1]["weight_decay"] == 0


def test_a_bias_of_any_shape_is_not_decayed():
    network = nn.Module()
    network.bias_table = nn.Module()
    network.bias_table.bias = nn.Parameter(torch.zeros(2, 2))
    decayed, plain = parameter_groups(network)
    assert not decayed["params"] and len(plain["params"]) == 1


def test_clipping_acts_on_every_parameter_alone():
    network = small_network()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for index, parameter in enumerate(trained):
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (index - 4)
    trained[2].grad = None
    expected = [None if p.grad is None else p.grad.clone() for p in trained]
    for gradient in expected:
        if gradient is not None and gradient.norm() > 0.5:
            gradient *= 0.5 / (gradient.norm() + 1e-6)
    norms = gradient_norms(trained)
    assert len(norms) == len(trained) - 1 and norms.min() < 0.5 < norms.max()
    clip_gradients(trained, norms, 0.5)
    for parameter, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_gradients_that_are_short_enough_stay_what_they_are_to_the_bit():
    network = small_network()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in trained]
    norms = gradient_norms(trained)
    clip_gradients(trained, norms, norms.max().item() + 1e-3)
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(trained, before, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clipping_is_the_same_on_a_gpu():
    gradients = [torch.randn(5, 3) * 10.0**power for power in range(-2, 3)]
    clipped = []
    for device in ("cpu", "cuda"):
        parameters = [nn.Parameter(torch.zeros(5, 3, device=device)) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone().to(device)
        clip_gradients(parameters, gradient_norms(parameters), 2.0)
        clipped.append([parameter.grad.cpu() for parameter in parameters])
    torch.testing.assert_close(*clipped)


def test_rates_are_set_for_all_and_weight_decay_for_the_first_group_only():
    optimizer = create_optimizer("adamw", parameter_groups(small_network()))
    set_rates(optimizer, 0.25, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.25, 0.5),
        (0.25, 0),
    ]


def test_adamw_equals_torchs_default():
    ours, theirs = small_network(), small_network()
    optimizer = create_optimizer("adamw", parameter_groups(ours))
    set_rates(optimizer, 1e-2, 0.1)
    decayed, plain = parameter_groups(theirs)
    train(ours, optimizer)
    train(theirs, torch.optim.AdamW([{**decayed, "weight_decay": 0.1}, plain], lr=1e-2))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_sgd_and_lars_train(name):
    network = small_network()
    optimizer = create_optimizer(name, parameter_groups(network))
    set_rates(optimizer, 0.1, 1e-4)
    before = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    train(network, optimizer)
    after = [p for p in network.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6])
def test_lars_takes_a_step_in_proportion_to_the_weights(weight_decay):
    weight = nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = create_optimizer("lars", [{"params": [weight]}, {"params": [], "weight_decay": 0.0}])
    set_rates(optimizer, 1.0, weight_decay)
    weight.grad = torch.full((2, 2), 1e4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 3.0 * (1 - 1e-3)))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match=r"^unknown optimizer 'adam'; known: adamw, sgd, lars$"):
        create_optimizer("adam", [])
