"""How much memory a training step will take, measured before the first one without computing anything."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Student, its gradients and AdamW's two moments; the teacher.
_COPIES_OF_STUDENT = 4
_FLOAT32_BYTES = 4


def step_memory(
    student: nn.Module, view_sizes: Sequence[int], batch_size: int, *, low_precision: bool
) -> int:
    """Bytes for weights, gradients, optimizer, teacher, and activations kept for the backward pass.

    The student runs on torch's `meta` device, which knows shapes but holds no values.

    Args:
        view_sizes: side of each square view in pixels.
        batch_size: pictures per process.
        low_precision: forward pass in bf16 or fp16; most activations then take half the space.
    """
    shapes_only = copy.deepcopy(student).to("meta").train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    views = [torch.empty(batch_size, 3, size, size, device="meta") for size in view_sizes]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = shapes_only(views)
    weights = _FLOAT32_BYTES * sum(parameter.numel() for parameter in student.parameters())
    activations = sum(kept.values()) // (2 if low_precision else 1)
    del output
    return weights * (_COPIES_OF_STUDENT + 1) + activations
