"""Where numbers that are not finite come from."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dino.runtime import distributed


def source_of_nonfinite(student: nn.Module, parts: Iterable[Sequence[Tensor]]) -> str:
    """In words, the module and the process in which the student's first number that is not finite appears.

    To be called by all processes, each with as many parts of its own views.
    """
    places = [first_nonfinite_module(student, part) for part in parts]
    own = min(filter(None, places), default=None)
    # Through batch norm it spreads to all processes: where it is found first, it began.
    found = [(place, rank) for rank, place in enumerate(distributed.gather([own])) if place is not None]
    if not found:
        return "every output of the student is finite, its loss or gradients are not"
    (_, name), rank = min(found)
    process = f" in process {rank}" if distributed.world_size() > 1 else ""
    return f"the first module of the student whose output is not finite is {name}{process}"


def first_nonfinite_module(network: nn.Module, views: Sequence[Tensor]) -> tuple[int, str] | None:
    """Place in the order of execution, and name, of the first module whose output is not finite; None if all are."""
    finite: list[bool] = []
    found: list[tuple[int, str]] = []
    probe = copy.deepcopy(network)

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            finite.append(all(t.isfinite().all().item() for t in tensors if isinstance(t, Tensor)))
            if not finite[-1]:
                found.append((len(finite), name))

        probe.get_submodule(name).register_forward_hook(hook)

    for name, module in probe.named_modules():
        if name and not any(module.children()):
            watch(name)
    device = next(probe.parameters()).device
    with torch.no_grad():
        probe([view.to(device) for view in views])
    return found[0] if found else None
