"""Attention by the Gram matrix against attention by queries, keys and values."""

import copy

import pytest
import torch
from torch import Tensor, nn

from xcit import layers
from xcit.gram import gram_matrix
from xcit.layers import CrossCovarianceAttention

DIM, HEADS = 24, 3


def attention(dtype: torch.dtype = torch.float64) -> CrossCovarianceAttention:
    module, generator = CrossCovarianceAttention(DIM, HEADS), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.to(dtype)


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    # The common part is larger than what differs, as in trained networks: differences of large sums would show.
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)
    return (own + 3 * torch.randn(DIM, generator=generator, dtype=torch.float64)).to(dtype)


def by_queries_and_keys(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layers, "_MANY_TOKENS", float("inf"))
        return module(x)


def test_the_gram_matrix_carries_sums_and_count() -> None:
    x_NC = tokens(7)[0]
    with_one_NE = torch.cat([x_NC, torch.ones(7, 1, dtype=x_NC.dtype)], dim=1)
    torch.testing.assert_close(gram_matrix(x_NC), with_one_NE.T @ with_one_NE)


def test_many_tokens_get_the_attention_that_few_get(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = attention(), tokens(layers._MANY_TOKENS * DIM)
    expected = by_queries_and_keys(module, x, monkeypatch)
    module.qkv.register_forward_pre_hook(lambda *_: pytest.fail("queries of all tokens"))
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


def test_gradients_are_of_the_direct_way() -> None:
    module, x = attention(), tokens(layers._MANY_TOKENS * DIM).requires_grad_()
    module(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_as_exact_as_the_direct_way(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, x = attention(), tokens(1000)
    module = copy.deepcopy(exact).float()
    expected = by_queries_and_keys(exact, x, monkeypatch)

    def error(result: Tensor) -> float:
        return float((result.double() - expected).norm() / expected.norm())

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        by_gram = error(module(x.float()))
        direct = error(by_queries_and_keys(module, x.float(), monkeypatch))
    assert by_gram < 2 * direct
    assert by_gram < (1e-2 if autocast else 1e-5)


def test_a_channel_that_is_zero_everywhere_gives_no_nan() -> None:
    module = attention()
    nn.init.zeros_(module.qkv.weight)
    nn.init.zeros_(module.qkv.bias)
    with torch.no_grad():
        assert module(tokens(layers._MANY_TOKENS * DIM)).isfinite().all()
