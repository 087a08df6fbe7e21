"""Values to be taken back when a step turns out to be none."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Copies:
    """The values of tensors before a step, to be taken back.

    In one piece for each dtype: there are many and small ones, and a GPU is started for each.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._of_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            self._of_dtype.setdefault(tensor.dtype, []).append(tensor)
        self._values = {dtype: _in_one(same) for dtype, same in self._of_dtype.items()}

    def restore_unless(self, kept: Tensor) -> None:
        """Where the bool scalar is false; not multiplied by it, which nan would survive."""
        for dtype, tensors in self._of_dtype.items():
            values = torch.where(kept, _in_one(tensors), self._values[dtype])
            parts = values.split([tensor.numel() for tensor in tensors])
            shaped = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
            torch._foreach_copy_(tensors, shaped)


def _in_one(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
