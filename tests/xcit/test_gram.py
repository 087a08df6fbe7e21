"""Attention by the Gram matrix against attention by queries, keys and values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xcit.gram import gram_matrix
from xcit.layers import CrossCovarianceAttention

DIM, HEADS = 24, 3


def attention() -> CrossCovarianceAttention:
    module, generator = CrossCovarianceAttention(DIM, HEADS), torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.double()


def tokens(count: int) -> Tensor:
    # The common part is larger than what differs, as in trained networks: differences of large sums would show.
    generator = torch.Generator().manual_seed(1)
    own = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return own + 3 * torch.randn(DIM, generator=generator, dtype=torch.float64)


def by_gram_matrix(module: CrossCovarianceAttention, x_NC: Tensor, part: int = 70) -> Tensor:
    weight, bias = module.as_linear(x_NC.split(part))
    return F.linear(x_NC, weight.to(x_NC.dtype), bias.to(x_NC.dtype))


def test_the_gram_matrix_carries_sums_and_count() -> None:
    x_NC = tokens(7)
    with_one_NE = torch.cat([x_NC, torch.ones(7, 1, dtype=x_NC.dtype)], dim=1)
    torch.testing.assert_close(gram_matrix(x_NC), with_one_NE.T @ with_one_NE)


@pytest.mark.parametrize("count", [1, 5, 24, 72, 500])
def test_any_number_of_tokens_gets_the_same_attention(count: int) -> None:
    module, x_NC = attention(), tokens(count)
    torch.testing.assert_close(by_gram_matrix(module, x_NC), module(x_NC[None])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_exact_as_the_direct_way(dtype: torch.dtype) -> None:
    exact, x_NC = attention(), tokens(1000)
    module, expected = copy.deepcopy(exact).to(dtype), exact(x_NC[None])[0]

    def error(result: Tensor) -> float:
        return float((result.double() - expected).norm() / expected.norm())

    with torch.no_grad():
        by_gram = error(by_gram_matrix(module, x_NC.to(dtype)))
        direct = error(module(x_NC.to(dtype)[None])[0])
    assert by_gram < 2 * direct
    assert by_gram < (5e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_channel_that_is_zero_everywhere_gives_no_nan() -> None:
    module = attention()
    nn.init.zeros_(module.qkv.weight)
    nn.init.zeros_(module.qkv.bias)
    assert by_gram_matrix(module, tokens(100)).isfinite().all()
