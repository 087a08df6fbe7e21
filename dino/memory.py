"""Memory of a training step: what it will take, measured without computing anything, what it took, and too little."""

import copy
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dino.runtime.batch_norm import CpuSyncBatchNorm
from dino.runtime.distributed import this_process
from dino.runtime.options import RankFailed

# The student, its gradients and AdamW's two moments; the teacher.
_COPIES_OF_WEIGHTS = 5
# The student's logits, the same over the temperature, their log-softmax, its gradient.
_COPIES_OF_LOGITS = 4
_FLOAT32_BYTES = 4
# What torch says of CPUs, CUDA and its libraries, and Apple GPUs.
_SHORTAGE = "not enough memory|can't allocate memory|out of memory|ALLOC_FAILED"


def step_memory(
    student: nn.Module, view_sizes: Sequence[int], batch_size: int, *, low_precision: bool
) -> int:
    """Bytes for weights, gradients, optimizer, teacher, loss, and activations kept for the backward pass.

    The student runs on torch's `meta` device, which knows shapes but holds no values.

    Args:
        view_sizes: side of each square view in pixels.
        batch_size: pictures that are computed at once.
        low_precision: forward pass in bf16 or fp16; most activations then take half the space.
    """
    shapes_only = copy.deepcopy(student).to("meta").train()
    for module in shapes_only.modules():
        if isinstance(module, nn.SyncBatchNorm | CpuSyncBatchNorm):
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


def peak_memory(device: torch.device) -> str:
    """The most that this process has held at once, in words: on a GPU of the GPU's memory, else of the machine's."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{_gib(torch.cuda.max_memory_reserved(device))} of the GPU's {_gib(total)}"
    if device.type == "mps":
        return _gib(torch.mps.driver_allocated_memory())
    import resource  # Unix alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _gib(peak if sys.platform == "darwin" else 1024 * peak)  # macOS counts bytes, Linux KiB


def smaller_steps(at_once: int, accumulate: int) -> str:
    """What a pre-training can do about too little memory.

    Args:
        at_once: pictures that are computed together.
        accumulate: parts of a step.
    """
    fewest = next((factor for factor in range(2, at_once + 1) if at_once % factor == 0), 1)
    in_parts = (
        f"--accumulate {fewest * accumulate} and, without --batch_size, --batch_size_per_gpu {at_once // fewest}, "
        "which leave a step its pictures; or "
        if fewest > 1
        else ""
    )
    return f"{in_parts}--grad_checkpointing true, fewer --local_crops_number or a smaller --out_dim"


@contextmanager
def explaining_shortage(at_once: int, advice: str) -> Iterator[None]:
    """No memory left in a step becomes a sentence that says what to lower.

    Args:
        at_once: pictures that are computed together.
        advice: options to give.

    Raises:
        RankFailed: in this process alone; the others come to know when it has ended.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_shortage(error):
            raise
        raise RankFailed(
            f"{this_process()} has too little memory for {at_once} pictures at once: give {advice}"
        ) from error


def _is_shortage(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return re.search(_SHORTAGE, str(error), re.IGNORECASE) is not None


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"
