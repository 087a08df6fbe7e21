"""How much memory a training step will take, measured before the first one without computing anything."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The student, its gradients and AdamW's two moments; the teacher.
_COPIES_OF_WEIGHTS = 5
# The student's logits, the same over the temperature, their log-softmax, its gradient.
_COPIES_OF_LOGITS = 4
_FLOAT32_BYTES = 4


def step_memory(
    student: nn.Module, view_sizes: Sequence[int], batch_size: int, *, low_precision: bool
) -> int:
    """Bytes for weights, gradients, optimizer, teacher, loss, and activations kept for the backward pass.

    The student runs on torch's `meta` device, which knows shapes but holds no values.

    Args:
        view_sizes: side of each square view in pixels.
        batch_size: pictures per process.
        low_precision: forward pass in bf16 or fp16; most activations then take half the space.
    """
    shapes_only = copy.deepcopy(student).to("meta").train()
    for module in shapes_only.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # in training it would talk to the other processes; it keeps as much either way
    weights = {tensor.untyped_storage()._cdata for tensor in shapes_only.state_dict(keep_vars=True).values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    views = [torch.empty(batch_size, 3, size, size, device="meta") for size in view_sizes]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = shapes_only(views)  # holds what is kept, so that no storage's number is used twice
    numbers = _COPIES_OF_WEIGHTS * sum(parameter.numel() for parameter in student.parameters())
    numbers += _COPIES_OF_LOGITS * output.logits_VBK.numel()
    activations = sum(kept.values())
    if low_precision:
        # Half, and so are the copies of the weights that autocast makes and keeps.
        activations = (activations + sum(tensor.nbytes for tensor in shapes_only.parameters())) // 2
    return _FLOAT32_BYTES * numbers + activations
