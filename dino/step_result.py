"""What a step did, in numbers that are read when the device has them: to ask at once would make the device wait."""

from collections import deque
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor


class StepResult:
    """On its way to the host; whoever reads it waits for the step to be done.

    Args:
        measures: scalars on the step's device.
        finite: a bool scalar beside them.
    """

    def __init__(self, measures: Mapping[str, Tensor], finite: Tensor) -> None:
        self._names = tuple(measures)
        numbers = torch.stack([*measures.values(), finite])
        # Elsewhere than from CUDA such a copy may be read before it is there.
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    @cached_property
    def _known(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()

    @property
    def measures(self) -> dict[str, float]:
        """Means over the ranks and parts: `loss`, and those of `dino.collapse`, of which some depend on how many
        pictures they are taken from."""
        return dict(zip(self._names, self._known[:-1], strict=True))

    @property
    def finite(self) -> bool:
        """False when the step was skipped, on all ranks, for a loss or gradient that is not a number."""
        return self._known[-1] == 1


class UnreadResults:
    """Those of the last steps, oldest first, with the numbers of the steps.

    Args:
        lag: as many may wait while the device is at work on them.
    """

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self._waiting: deque[tuple[int, StepResult]] = deque()

    def add(self, step: int, result: StepResult) -> None:
        self._waiting.append((step, result))

    def due(self, *, all_of_them: bool) -> Iterator[tuple[int, StepResult]]:
        """Take out those that are more than may wait, or all."""
        while len(self._waiting) > (0 if all_of_them else self.lag):
            yield self._waiting.popleft()

    def __iter__(self) -> Iterator[StepResult]:
        """Those that wait, and stay."""
        return (result for _, result in self._waiting)
