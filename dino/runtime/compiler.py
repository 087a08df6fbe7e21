"""Whether to use `torch.compile`, which needs compilers that a machine may lack."""

import torch
from torch import Tensor

from dino.runtime.options import UserError


def pick_compile(wanted: str, device: torch.device) -> bool:
    """`auto` compiles on CUDA where the compiler works; `true` and `false` are what they say.

    Raises:
        UserError: `true`, and the compiler does not work.
    """
    if wanted == "false" or (wanted == "auto" and device.type != "cuda"):
        return False
    problem = compiler_problem(device)
    if problem and wanted == "true":
        raise UserError(
            f"--compile true: torch's compiler does not work here: {problem}; use --compile auto or false"
        )
    return not problem


def compiler_problem(device: torch.device) -> str:
    """Why torch cannot compile for a device, in a line; empty where it can. To find out takes some seconds."""
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # of any kind: no compiler or no headers, no Triton, too old a GPU
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


def _probe(values: Tensor) -> Tensor:
    return values.sin().sum()
