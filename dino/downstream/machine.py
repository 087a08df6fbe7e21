"""What a process of a downstream run computes with."""

from typing import NamedTuple

import torch

from dino.downstream.run_options import RunOptions
from dino.runtime import distributed


class Machine(NamedTuple):
    """Device, precision of the forward pass (`fp32`, `bf16` or `fp16`), and loading processes."""

    device: torch.device
    precision: str
    num_workers: int

    @classmethod
    def of(cls, options: RunOptions) -> "Machine":
        """What the options ask for, here.

        Raises:
            UserError: this machine does not have it.
        """
        device = distributed.pick_device(options.device, options.local_rank)
        precision = distributed.pick_precision(options.precision, device)
        return cls(device, precision, distributed.share_cores(device, options.num_workers))
