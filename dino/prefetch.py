"""The views of the next step on their way to the GPU while it computes the present one."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from dino.loader import Batch
from dino.runtime.options import Interrupted, UserError

Prepare: TypeAlias = Callable[[Batch], list[Tensor]]


class Prefetch:
    """Batches -> their views on the device, ready for the step.

    For CUDA they are copied, and prepared, one batch ahead and on a stream of their own. What stops the batches is
    then raised where their next would have come: in all processes before the same step, if it is in all of them.

    Args:
        prepare: from a batch, in pinned memory for CUDA, to its views on the device.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device, prepare: Prepare) -> None:
        self.batches = batches
        self.device = device
        self.prepare = prepare

    def __iter__(self) -> Iterator[list[Tensor]]:
        if self.device.type == "cuda":
            return self._ahead()
        return map(self.prepare, self.batches)

    def _ahead(self) -> Iterator[list[Tensor]]:
        side = torch.cuda.Stream(self.device)
        batches = iter(self.batches)
        coming = self._start(batches, side)
        while coming is not None:
            following, problem = None, None
            try:
                following = self._start(batches, side)
            except (UserError, Interrupted) as error:
                problem = error
            yield self._arrived(coming)
            if problem is not None:
                raise problem
            coming = following

    def _start(
        self, batches: Iterator[Batch], side: torch.cuda.Stream
    ) -> tuple[list[Tensor], torch.cuda.Event] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(side):
            return self.prepare(batch), side.record_event()

    def _arrived(self, coming: tuple[list[Tensor], torch.cuda.Event]) -> list[Tensor]:
        """The step's stream waits for them, and their memory is not given to others before it is done with them."""
        views, ready = coming
        step = torch.cuda.current_stream(self.device)
        step.wait_event(ready)
        for view in views:
            view.record_stream(step)
        return views
