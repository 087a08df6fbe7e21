"""Linear layers against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from xcit.linear import Linear, linear


@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 5), (512, 5), (2, 300, 5), (3, 4, 50, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, requires_grad=True)
    layer = Linear(5, 7, bias=bias)
    ours, theirs = layer(x), F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    parts = [x, *layer.parameters()]
    direction = torch.randn_like(theirs)
    for one, other in zip(
        torch.autograd.grad(ours, parts, direction),
        torch.autograd.grad(theirs, parts, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_tokens_need_not_lie_one_after_the_other() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 300).transpose(1, 2), torch.randn(7, 5)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_kept(dtype: torch.dtype) -> None:
    layer = Linear(5, 7).to(dtype)
    x = torch.randn(2, 300, 5, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_autocast_decides_the_precision() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert Linear(5, 7)(torch.randn(2, 300, 5)).dtype == torch.bfloat16


def test_it_is_a_torch_layer_with_the_same_weights() -> None:
    assert isinstance(Linear(5, 7), torch.nn.Linear)
    assert list(Linear(5, 7).state_dict()) == list(torch.nn.Linear(5, 7).state_dict())
