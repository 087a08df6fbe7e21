import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dino.head import DinoHead

LINEAR = ("weight", "bias")


@pytest.mark.parametrize(("use_bn", "linear", "norms"), [(False, (0, 2, 4), ()), (True, (0, 3, 6), (1, 4))])
def test_keys_are_those_of_the_published_checkpoints(use_bn, linear, norms):
    expected = {f"mlp.{i}.{part}" for i in (*linear, *norms) for part in LINEAR}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    expected |= {f"mlp.{i}.{buffer}" for i in norms for buffer in buffers}
    expected |= {"last_layer.weight_g", "last_layer.weight_v"}
    state = DinoHead(8, 16, use_bn=use_bn, hidden_dim=12, bottleneck_dim=6).state_dict()
    assert set(state) == expected
    assert state["last_layer.weight_g"].shape == (16, 1) and state["last_layer.weight_v"].shape == (16, 6)


def test_the_head_of_the_paper_has_22_million_parameters():
    assert sum(p.numel() for p in DinoHead(384, 65536).parameters()) == pytest.approx(22.35e6, abs=5e3)


@pytest.mark.parametrize("use_bn", [False, True])
def test_logits_and_gradients_equal_torchs_weight_norm(use_bn):
    torch.manual_seed(0)
    head = DinoHead(8, 16, use_bn=use_bn, norm_last_layer=False, hidden_dim=12, bottleneck_dim=6)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter))
    prototypes = weight_norm(nn.Linear(6, 16, bias=False))
    parts = prototypes.parametrizations.weight
    parts.original0 = nn.Parameter(head.last_layer.weight_g.detach().clone())
    parts.original1 = nn.Parameter(head.last_layer.weight_v.detach().clone())
    features = torch.randn(5, 8)

    ours_in, theirs_in = features.clone().requires_grad_(), features.clone().requires_grad_()
    ours = head(ours_in)
    theirs = prototypes(F.normalize(head.mlp(theirs_in), dim=-1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad(
        (ours * weights).sum(), [ours_in, head.last_layer.weight_g, head.last_layer.weight_v]
    )
    expected = torch.autograd.grad((theirs * weights).sum(), [theirs_in, parts.original0, parts.original1])
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_norm_last_layer_keeps_prototypes_at_length_one():
    fixed = DinoHead(8, 16, hidden_dim=12, bottleneck_dim=6)
    learned = DinoHead(8, 16, hidden_dim=12, bottleneck_dim=6, norm_last_layer=False)
    assert not fixed.last_layer.weight_g.requires_grad and learned.last_layer.weight_g.requires_grad
    assert (fixed.last_layer.weight_g == 1).all() and (learned.last_layer.weight_g == 1).all()
    logits = fixed(100 * torch.randn(64, 8))
    assert logits.abs().max() <= 1 + 1e-6 and logits.std() > 0.1  # cosines, whatever the features' length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_under_autocast_are_float32_and_not_rounded_to_half(dtype):
    head = DinoHead(8, 16, hidden_dim=12, bottleneck_dim=6)
    with torch.autocast("cpu", dtype=dtype):
        bottleneck = head.mlp(features := torch.randn(5, 8))
        logits = head(features)
    assert bottleneck.dtype == dtype and logits.dtype == torch.float32
    directions = F.normalize(head.last_layer.weight_v.double(), dim=-1)
    expected = F.normalize(bottleneck.double(), dim=-1) @ directions.T
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-6)
