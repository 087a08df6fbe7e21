"""Linear layers of many tokens, as fast as the processor can."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# For fewer rows it is slower.
_MANY_ROWS = 512


class Linear(nn.Linear):
    """`nn.Linear`, the same layer with the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, which in float32 on a CPU may be computed as a convolution with a 1 x 1 kernel.

    For that torch has oneDNN, which on processors that are not Intel's is up to a tenth faster than MKL, which it has
    for matrix products; not for those of the gradients, so only without them.
    """
    if not _better_convolved(x, weight):
        return F.linear(x, weight, bias)
    # (1, C, rows, 1) with the channels last is the same memory as (rows, C).
    rows_1CR1 = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    result_1CR1 = F.conv2d(rows_1CR1, weight[:, :, None, None], bias)
    return result_1CR1.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _better_convolved(x: Tensor, weight: Tensor) -> bool:
    return (
        not is_traced()
        and not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= _MANY_ROWS * x.shape[-1]
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def is_traced() -> bool:
    """Whether what runs becomes a graph, which must hold for other sizes too and is optimised by its compiler."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()  # type: ignore[attr-defined]
