"""How long a downstream run is: its steps, and the rounds after which it is evaluated."""

import math
from dataclasses import dataclass

from dino.loader import EpochOrder
from dino.runtime import distributed
from dino.runtime.options import UserError


@dataclass(frozen=True)
class Length:
    """Steps of a run; a round is an epoch, or some iterations.

    Attributes:
        count: pictures in the set.
        global_batch: pictures of a step, over all processes.
        steps: of the whole run.
        steps_per_round: of each round but the last, which may be shorter.
        repeats: see `EpochOrder`.
    """

    count: int
    global_batch: int
    steps: int
    steps_per_round: int
    repeats: int = 1

    @property
    def rounds(self) -> int:
        return math.ceil(self.steps / self.steps_per_round)

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.global_batch

    def ends_round(self, step: int) -> bool:
        """Whether a round is over when so many steps are done."""
        return step == self.steps or step % self.steps_per_round == 0

    def order_after(self, step: int, seed: int) -> EpochOrder:
        """This process's pictures from a step on."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return EpochOrder(
            self.count,
            global_batch=self.global_batch,
            epochs=math.ceil(self.steps / self.steps_per_epoch),
            seed=seed,
            epoch=epoch,
            samples=within * self.global_batch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            repeats=self.repeats,
        )


def of_epochs(count: int, batch_size: int, epochs: int, *, repeats: int = 1) -> Length:
    """A run of so many epochs.

    Args:
        batch_size: pictures of a step of one process.

    Raises:
        UserError: the pictures do not fill one step.
    """
    batch = _global_batch(count, batch_size)
    per_epoch = count // batch
    return Length(count, batch, epochs * per_epoch, per_epoch, repeats)


def of_iterations(count: int, batch_size: int, iterations: int, *, every: int) -> Length:
    """A run of so many steps, in rounds of `every` steps."""
    return Length(count, _global_batch(count, batch_size), iterations, min(every, iterations))


def _global_batch(count: int, batch_size: int) -> int:
    batch = batch_size * distributed.world_size()
    if count < batch:
        raise UserError(
            f"an epoch has no step: {count} pictures do not fill one batch of {batch}; "
            f"lower --batch_size to {max(count // distributed.world_size(), 1)} or less"
        )
    return batch
