"""The run that all downstream tasks share: steps, evaluations, a log, and checkpoints that it continues from."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dino.copies import Copies
from dino.curves import Panel, draw_curves
from dino.downstream.length import Length
from dino.downstream.run_options import RunOptions
from dino.downstream.samples import Batch
from dino.downstream.state import BEST_NAME, Place, State
from dino.feed import Feed
from dino.loader import EpochOrder, mixed_seed
from dino.memory import explaining_shortage, peak_memory
from dino.runtime import checkpoint, distributed
from dino.runtime.backbones import evaluating
from dino.runtime.batch_norm import synchronised
from dino.runtime.changed_options import changed_options, changes_line, stored_options
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted, RunStopped
from dino.runtime.run_log import EpochMeans, RunLog

_NONFINITE_STEPS_ALLOWED = 10
_ADVICE = "a smaller --batch_size, or --grad_checkpointing true"
# These may differ on another machine without it being another run.
_OF_THE_MACHINE = {
    *("output_dir", "num_workers", "dist_url", "local_rank", "device", "wait_minutes"),
    *("data_path", "weights", "pretrained", "resume", "preset"),
}


@dataclass(frozen=True, eq=False)
class Task:
    """What tells one downstream task from another.

    Attributes:
        network: on its device.
        losses: network and a batch's content to scalars, whose sum is to become small; called in mixed precision,
            with the network perhaps in DistributedDataParallel.
        evaluate: network, in evaluation mode, to measures; called in all processes, which get the same ones.
        best_by: measure, higher is better, that the network of `best_model.pth` is chosen by.
        open_loader: the batches of an order.
        facts: plain values that whoever uses the network needs, such as the names of its classes.
        panels: curves that are drawn, beside the loss and the learning rate.
    """

    network: nn.Module
    losses: Callable[[nn.Module, Any], Mapping[str, Tensor]]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    best_by: str
    open_loader: Callable[[EpochOrder], Iterable[Batch]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    panels: Sequence[Panel] = ()


class Training:
    """One run in the folder `--output_dir`, which is this process's own.

    Args:
        optimizer: of the network's parameters.
        scheduler: sets the learning rate before each step, by `step_update`.
        precision: of the forward pass: `fp32`, `bf16` or `fp16`.
        clip_grad: longest gradient, over all parameters (L2 norm); 0 = no clipping.
        val_every: rounds from one evaluation to the next; the last round is always evaluated.
        ema: moving average of the network, evaluated beside it; None = none.
        resume_from: checkpoint to begin with where the folder has none.

    Raises:
        UserError: the folder's checkpoint cannot be read or is of another network.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        length: Length,
        options: RunOptions,
        interruption: Interruption,
        *,
        device: torch.device,
        precision: str,
        num_workers: int,
        clip_grad: float = 0.0,
        val_every: int = 1,
        ema: ModelEmaV3 | None = None,
        resume_from: Path | None = None,
    ) -> None:
        self.task = task
        self.scheduler = scheduler
        self.length = length
        self.options = options
        self.interruption = interruption
        self.device = device
        self.precision = precision
        self.num_workers = num_workers
        self.clip_grad = clip_grad
        self.val_every = val_every
        self.folder = Path(options.output_dir)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.state = State(task.network, optimizer, scaler, ema)
        with distributed.together():
            self.place, self.notes = self._resume(resume_from)
        self.totals = EpochMeans(self.place.totals)
        self.parallel = _in_parallel(task.network, device)
        self._trained = [parameter for parameter in task.network.parameters() if parameter.requires_grad]
        self._statistics = list(task.network.buffers())
        self._nonfinite_in_a_row = 0
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.place.samples // self.length.global_batch

    def run(self, opening: Sequence[str] = ()) -> list[dict[str, Any]]:
        """From where the run stands to its end.

        Args:
            opening: lines on what is going to happen.

        Returns:
            The rows of `log.txt`.

        Raises:
            Interrupted: a signal came; all is saved.
            RunStopped: the loss does not stay finite.
            UserError: too many pictures cannot be read, or a file cannot be written.
        """
        self.log = RunLog(
            self.folder,
            steps=self.length.steps,
            first_step=self.step,
            first_epoch=self.place.rounds,
            pictures_per_step=self.length.global_batch,
            active=distributed.is_main(),
        )
        # Only from here on: pictures and weights may have been searched and downloaded until now.
        distributed.wait_at_most(timedelta(minutes=self.options.wait_minutes))
        try:
            for line in [*opening, *self.notes, *distributed.restart_note()]:
                self.log.say(line)
            if self._owes_a_round():
                self._end_round()  # what was left to do when the run was killed
            elif self.step >= self.length.steps:
                self.log.say("nothing to train: all of it is done; a longer run continues")
            if self.step < self.length.steps:
                self._train()
        except Interrupted as reason:
            self._save()
            raise Interrupted(
                f"stopped by {reason} after {self.step} steps, which are saved in {self.folder}; "
                "the same command continues"
            ) from None
        finally:
            self.log.close()
        return self.log.rows

    def _resume(self, resume_from: Path | None) -> tuple[Place, list[str]]:
        content, note = checkpoint.load_latest(self.folder)
        source = self.folder
        if content is None:
            if resume_from is None:
                return Place(), []
            content, source = checkpoint.load(resume_from), resume_from
        per_round = self.length.steps_per_round * self.length.global_batch
        place = self.state.unpack(content, pictures_per_round=per_round)
        # Another batch than before: the nearest whole step of this one.
        steps = round(place.samples / self.length.global_batch)
        place = dataclasses.replace(place, samples=steps * self.length.global_batch)
        lines = [*([note] if note else []), f"resumed:   {source} after {steps} steps"]
        changed = changed_options(stored_options(content.get("args")), self.options, besides=_OF_THE_MACHINE)
        if changed and "progress" in content:
            lines.append(changes_line(changed))
        return place, lines

    def _owes_a_round(self) -> bool:
        """Whether a round is trained whose evaluation is not in the log."""
        trained = math.ceil(self.step / self.length.steps_per_round)
        return self.length.ends_round(self.step) and self.place.rounds < trained

    def _train(self) -> None:
        self.log.start()
        began, first_step = time.monotonic(), self.step
        feed = Feed(
            self.task.open_loader,
            self.interruption,
            max_broken=self.options.max_broken,
            num_workers=self.num_workers,
            say=self.log.say,
        )
        at_once = self.length.global_batch // distributed.world_size()
        for batch in feed.batches(self.length.order_after(first_step, self.options.seed)):
            with explaining_shortage(at_once, _ADVICE):
                self._take_step(batch.content)
            if self.step == first_step + 1:
                self.log.say(f"memory:    {peak_memory(self.device)} at its peak in the first step")
            if self.length.ends_round(self.step):
                for line in feed.long_waits(time.monotonic() - began):
                    self.log.say(line)
                self._end_round()
            elif self._is_due():
                self._save()
            if self.step >= self.length.steps:
                return

    def _take_step(self, content: Any) -> None:
        """One step of all processes; if loss or gradients are not finite, it changes nothing but the order."""
        _seed_all(mixed_seed(self.options.seed, self.step, distributed.rank()))
        before = Copies(self._statistics)
        self.state.network.train()
        self.scheduler.step_update(self.step)
        self.state.optimizer.zero_grad(set_to_none=True)
        with distributed.autocast(self.device, self.precision):
            losses = self.task.losses(self.parallel, content)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        self.state.scaler.scale(loss).backward()
        self.state.scaler.unscale_(self.state.optimizer)
        norm = nn.utils.clip_grad_norm_(self._trained, self.clip_grad or math.inf, error_if_nonfinite=False)
        measures = _means_over_ranks({"loss": loss, **losses})
        finite = math.isfinite(measures["loss"]) and math.isfinite(float(norm))
        if finite:
            self.state.optimizer.step()
            if self.state.ema:
                # By its step the average knows how far its decay has risen; given one, it begins as a copy.
                self.state.ema.update(
                    self.state.network, step=self.step if self.state.ema.use_warmup else None
                )
        self.state.scaler.update()
        before.restore_unless(torch.tensor(finite, device=self.device))
        self.place = dataclasses.replace(self.place, samples=self.place.samples + self.length.global_batch)
        self._take_note(measures, finite)

    def _take_note(self, measures: dict[str, float], finite: bool) -> None:
        self.log.step(self.place.rounds, measures["loss"])
        if finite:
            self._nonfinite_in_a_row = 0
            self.totals.add(measures)
            return
        self.totals.skip()
        if self.state.scaler.is_enabled() and math.isfinite(measures["loss"]):
            return  # fp16 is finding its scale
        self._nonfinite_in_a_row += 1
        self.log.say(f"step {self.step - 1}: loss or gradients are not finite; the step is skipped")
        if self._nonfinite_in_a_row >= _NONFINITE_STEPS_ALLOWED:
            self._save()
            raise RunStopped(
                f"{_NONFINITE_STEPS_ALLOWED} steps in a row were not finite; the weights before them are saved in "
                f"{self.folder}. Lower --lr, or try --precision fp32"
            )

    def _end_round(self) -> None:
        """Evaluate, log and save. What is trained is saved first: to evaluate takes a while."""
        number = self.place.rounds
        self._save()
        row: dict[str, Any] = {"epoch": number, "train_lr": self.state.optimizer.param_groups[0]["lr"]}
        row |= {f"train_{name}": value for name, value in self.totals.means().items()}
        row["skipped_steps"] = self.totals.skipped
        is_best = False
        if (number + 1) % self.val_every == 0 or self.step >= self.length.steps:
            row |= self._evaluate()
            best = max(row[self.task.best_by], row.get(f"ema_{self.task.best_by}", -math.inf))
            is_best = self.place.best is None or best > self.place.best
            if is_best:
                self.place = dataclasses.replace(self.place, best=best)
        self.place = dataclasses.replace(self.place, rounds=number + 1, totals=None)
        self.totals = EpochMeans()
        self.log.epoch(row)
        if distributed.is_main():
            draw_curves(self.log.rows, self.folder / "curves.png", self._panels())
        if is_best:
            self._save_best(row)
        self._save()

    def _evaluate(self) -> dict[str, float]:
        """Measures of the network, and those of its average, with `ema_` before their names."""
        networks = {"": self.state.network}
        if self.state.ema:
            networks["ema_"] = self.state.ema.module
        row: dict[str, float] = {}
        for prefix, network in networks.items():
            with evaluating(network), torch.no_grad():
                measures = self.task.evaluate(network)
            row |= {prefix + name: value for name, value in measures.items()}
            said = ", ".join(f"{name} {value:.3f}" for name, value in measures.items())
            whose = "of the moving average: " if prefix else ""
            self.log.say(f"after {self.step} steps: {whose}{said}")
        return row

    def _save_best(self, row: Mapping[str, float]) -> None:
        """The weights alone, of the network or its average, whichever is better."""
        if not distributed.is_main():
            return
        by = self.task.best_by
        average = self.state.ema is not None and row[f"ema_{by}"] > row[by]
        network = self.state.ema.module if self.state.ema and average else self.state.network
        content = {"model": network.state_dict(), "args": dataclasses.asdict(self.options), **self.task.facts}
        checkpoint.save_atomically(content, self.folder / BEST_NAME)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if not distributed.is_main():
            return
        place = dataclasses.replace(self.place, totals=self.totals.sums)
        args = dataclasses.asdict(self.options)
        checkpoint.save_latest(self.state.pack(place, args=args, facts=self.task.facts), self.folder)

    def _is_due(self) -> bool:
        minutes = self.options.save_every_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _panels(self) -> list[Panel]:
        return [Panel("train_loss", "Loss", ""), *self.task.panels, Panel("train_lr", "Learning rate")]


def _in_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return network
    return DistributedDataParallel(synchronised(network, device))


def _means_over_ranks(values: Mapping[str, Tensor]) -> dict[str, float]:
    together = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, distributed.mean_over_ranks(together).tolist(), strict=True))


def _seed_all(seed: int) -> None:
    """Of all generators that a step draws from: its draws are a function of the step, and nothing of them is saved."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
