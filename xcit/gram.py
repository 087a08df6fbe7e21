"""Cross-covariance attention as one linear layer, which the tokens' Gram matrix gives.

Queries and keys of all tokens are only needed for their products, over which the sum is taken first:
q^T k = W_q (X^T X) W_k^T. What the attention then makes of the tokens is linear in each of them. With many tokens that
is half the arithmetic, and no queries, keys or values are held.

N tokens, C channels, E = C + 1 with the constant channel that carries the biases, H heads, D channels of a head.
"""

import torch
from torch import Tensor, nn

_SHORTEST = 1e-12


def gram_matrix(x_NC: Tensor) -> Tensor:
    """Products of all channels, and of a constant one, summed over the tokens: (E, E), at least float32.

    bfloat16 is multiplied as it is: give it some tokens at a time, and its rounding averages out.
    """
    wide_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    factor_NC = x_NC if x_NC.dtype == torch.bfloat16 else wide_NC
    sums_C = wide_NC.sum(dim=0)
    products_CC = (factor_NC.T @ factor_NC).to(wide_NC.dtype)
    with_sums_EC = torch.cat([products_CC, sums_C[None]])
    return torch.cat([with_sums_EC, torch.cat([sums_C, sums_C.new_tensor([len(x_NC)])])[:, None]], dim=1)


def linear_of_picture(
    gram_EE: Tensor, qkv: nn.Linear, temperature_H11: Tensor, proj: nn.Linear
) -> tuple[Tensor, Tensor]:
    """Weight (C, C) and bias (C,) with which this picture's tokens go through attention and projection (eq. 2, 3)."""
    heads = len(temperature_H11)
    qkv_weight = torch.cat([qkv.weight, qkv.bias[:, None]], dim=1).to(gram_EE.dtype)
    query_HDE, key_HDE, value_HDE = (part.unflatten(0, (heads, -1)) for part in qkv_weight.chunk(3))
    query_gram_HDE, key_gram_HDE = query_HDE @ gram_EE, key_HDE @ gram_EE
    query_length_HD1 = _length(query_gram_HDE, query_HDE)
    key_length_HD1 = _length(key_gram_HDE, key_HDE)
    cosine_HDD = query_gram_HDE @ key_HDE.mT / (query_length_HD1 * key_length_HD1.mT)
    mixed_HDE = (cosine_HDD * temperature_H11.to(gram_EE.dtype)).softmax(dim=-1) @ value_HDE
    weight_CE = proj.weight.to(gram_EE.dtype) @ mixed_HDE.flatten(0, 1)
    return weight_CE[:, :-1], weight_CE[:, -1] + proj.bias


def _length(product_HDE: Tensor, weight_HDE: Tensor) -> Tensor:
    """Of each channel over all tokens, (H, D, 1)."""
    return (product_HDE * weight_HDE).sum(dim=-1, keepdim=True).clamp(min=_SHORTEST**2).sqrt()
