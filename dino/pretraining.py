"""The pre-training run: build the parts from the options, continue what is in the output folder, loop.

`dino.train` is the command; one step of the method is in `dino.distillation`.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino.attention.run_page import write_run_page
from dino.batched_distortions import OnDevice
from dino.collapse import CollapseWatch
from dino.curves import draw_curves
from dino.feed import Feed
from dino.loader import Batch, EpochOrder, create_loader, joined, mixed_seed
from dino.memory import explaining_shortage, peak_memory, smaller_steps
from dino.nonfinite import source_of_nonfinite
from dino.plan import (
    check_options,
    create_distillation,
    create_monitor,
    create_plan,
    create_views,
    share_of_step,
)
from dino.prefetch import Prefetch
from dino.resume import check_agreement, new_pictures, resume_or_start
from dino.runtime import checkpoint, distributed
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted, RunStopped, UserError
from dino.runtime.pictures import open_pictures
from dino.runtime.run_log import EpochMeans, RunLog
from dino.runtime.running import running
from dino.step_result import StepResult, UnreadResults
from dino.summary import closing_lines, opening_lines
from dino.train_options import TrainOptions

_NONFINITE_STEPS_ALLOWED = 10
# Even a crop of 5 % of a picture with this many times the global view's side is larger than a local view.
_ENOUGH_FOR_CROPS = 4
# Steps in a row that must look collapsed before it is called so.
_COLLAPSE_PATIENCE = 50
# A GPU gets the next step while it computes; what a step did is read after so many more.
_STEPS_AHEAD = 1


def pretrain(options: TrainOptions) -> None:
    """Run or continue a pre-training.

    Raises:
        UserError: options, pictures or files that do not fit; no file of an earlier run is changed.
        RunStopped: the run ended early for a stated reason, after saving.
        RankFailed: this process ended for a reason of its own; the last checkpoint is what is left.
    """
    device = distributed.pick_device(options.device, options.local_rank)
    folder = Path(options.output_dir)
    with running(
        folder,
        device,
        check=partial(check_options, options),
        dist_url=options.dist_url,
        wait_minutes=options.wait_minutes,
        deterministic=options.deterministic,
    ) as interruption:
        run = Pretraining(options, device, interruption)
        # Only from here on: a slow disk may have been searched until now.
        distributed.wait_at_most(timedelta(minutes=options.wait_minutes))
        run.run()


class Pretraining:
    """One run in one folder, which is this process's own."""

    def __init__(
        self, options: TrainOptions, device: torch.device, interruption: Interruption | None = None
    ) -> None:
        self.options = options
        self.device = device
        self.interruption = interruption or Interruption()
        self.folder = Path(options.output_dir)
        full_precision = options.precision == "auto" and not options.use_fp16
        self.precision = distributed.pick_precision("fp32" if full_precision else options.precision, device)
        self.workers = distributed.share_cores(device, options.num_workers)
        self.global_batch, self.at_once = share_of_step(options)
        self.advice = smaller_steps(self.at_once, options.accumulate)
        self.distillation = create_distillation(options, device, self.precision)
        with distributed.together():
            self.pictures = open_pictures(options.data_path)
            self.plan = create_plan(options, len(self.pictures), self.global_batch)
            self.monitor = create_monitor(
                options,
                self.pictures,
                device=device,
                precision=self.precision,
                num_workers=self.workers,
                interruption=self.interruption,
                say=lambda line: self.log.say(line),
            )
            found, notes = resume_or_start(self.distillation, self.folder, options)
        check_agreement(found, len(self.pictures), self.precision)
        self.progress = dataclasses.replace(found, pictures=len(self.pictures))
        self.notes = [*notes, *new_pictures(found, len(self.pictures))]
        self.totals = EpochMeans(self.progress.totals)
        self.unread = UnreadResults(lag=_STEPS_AHEAD if device.type == "cuda" else 0)
        self.first_step = self._steps_done()
        unsettled = max(self.plan.held_steps, options.warmup_epochs * self.plan.steps_per_epoch)
        self.watch = CollapseWatch(
            options.out_dim,
            patience_steps=_COLLAPSE_PATIENCE,
            ignore_steps=max(unsettled - self.first_step, 0),
        )
        self.collapses: set[str] = set()
        self.nonfinite_in_a_row = 0
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """From where the run stands to its end."""
        opening = opening_lines(
            self.options, self.pictures, self.plan, self.distillation.student, self.device, self.precision
        )
        self.log = RunLog(
            self.folder,
            steps=self.plan.steps,
            first_step=self.first_step,
            first_epoch=self.progress.epoch,
            pictures_per_step=self.global_batch,
            active=distributed.is_main(),
        )
        try:
            compiling = (
                ["compiling: the first steps take minutes"] if self.distillation.student.is_compiled else []
            )
            for line in [*opening, *compiling, *self.notes, *distributed.restart_note()]:
                self.log.say(line)
            self._look_before()
            if self.progress.epoch < self.options.epochs and not self._epoch_has_a_step():
                self._end_epoch()  # what was left to do when the run was killed
            if self.progress.epoch < self.options.epochs:
                self._train()
            else:
                self.log.say("nothing to train: all epochs are done; a larger --epochs continues")
        except Interrupted as reason:
            self._save()
            raise Interrupted(
                f"stopped by {reason} after {self._steps_done()} steps, which are saved in {self.folder}; "
                "the same command continues"
            ) from None
        finally:
            self.log.close()
        if distributed.is_main():
            print(*closing_lines(self.folder, self.log.rows), sep="\n")

    def _train(self) -> None:
        self.log.start()
        began = time.monotonic()
        feed = self._create_feed()
        upcoming = iter(Prefetch(feed.batches(self._order()), self.device, OnDevice(self.device)))
        while views := self._next(upcoming):
            step = self._steps_done()
            # The state of the generator is a function of the step: nothing of it needs to be saved.
            torch.manual_seed(mixed_seed(self.options.seed, step, distributed.rank()))
            with explaining_shortage(self.at_once, self.advice):
                self.unread.add(step, self.distillation.step(views, self.plan.rates(step)))
            self.progress = dataclasses.replace(
                self.progress, samples=self.progress.samples + self.global_batch
            )
            if step == self.first_step:
                self.log.say(f"memory:    {peak_memory(self.device)} at its peak in the first step")
            is_last = not self._epoch_has_a_step()
            for earlier, result in self.unread.due(all_of_them=is_last):
                self._take_note(earlier, result, views)
            if is_last:
                for line in feed.long_waits(time.monotonic() - began):
                    self.log.say(line)
                self._end_epoch()
            elif self._is_due():
                self._save()

    def _next(self, upcoming: Iterator[list[Tensor]]) -> list[Tensor] | None:
        """What stops all processes before a step finds the steps before it saved."""
        try:
            with explaining_shortage(self.at_once, self.advice):
                return next(upcoming, None)
        except UserError:
            if self._steps_done() > self.first_step:
                self._save()
            raise

    def _create_feed(self) -> Feed[Batch]:
        open_loader = partial(
            create_loader,
            self.pictures,
            create_views(self.options, self.device),
            enough=_ENOUGH_FOR_CROPS * self.options.global_crops_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        return Feed(
            open_loader,
            self.interruption,
            join=joined,
            max_broken=self.options.max_broken,
            num_workers=self.workers,
            say=self.log.say,
        )

    def _order(self) -> EpochOrder:
        return EpochOrder(
            len(self.pictures),
            global_batch=self.global_batch,
            epochs=self.options.epochs,
            seed=self.options.seed,
            epoch=self.progress.epoch,
            samples=self.progress.samples,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            parts=self.options.accumulate,
        )

    def _take_note(self, step: int, result: StepResult, views: list[Tensor]) -> None:
        """Of what a step did.

        Args:
            views: of the latest step, for where numbers that are not finite come from.
        """
        self.log.step(self.progress.epoch, result.measures["loss"])
        _count(self.totals, result)
        if result.finite:
            self.nonfinite_in_a_row = 0
            self._watch_for_collapse(result.measures)
        elif not self._is_finding_a_scale(result):
            self.nonfinite_in_a_row += 1
            self.log.say(f"step {step}: loss or gradients are not finite; the step is skipped")
        if self.nonfinite_in_a_row >= _NONFINITE_STEPS_ALLOWED:
            self._stop_nonfinite(step, views)

    def _is_finding_a_scale(self, result: StepResult) -> bool:
        """In fp16 gradients overflow until the loss is scaled low enough, which is no failure."""
        scaler = self.distillation.scaler
        return scaler.is_enabled() and math.isfinite(result.measures["loss"]) and scaler.get_scale() > 1

    def _end_epoch(self) -> None:
        epoch = self.progress.epoch
        looks = self._looks_after(epoch + 1)
        if looks:
            self._save()  # looking takes a while, and the epoch is worth more than a look
        means, rates = self.totals.means(), self.plan.means(epoch)
        row: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": means.pop("loss", None),
            "train_lr": rates.pop("lr"),
            "train_wd": rates.pop("weight_decay"),
            **means,
            **rates,
            "skipped_steps": self.totals.skipped,
        }
        if looks:
            row |= self._look(epoch + 1)
        if "knn" in row:
            before = {"knn_random": self.progress.knn_random, "knn_init": self.progress.knn_init}
            row |= {name: value for name, value in before.items() if value is not None}
            self._watch_for_forgetting(row["knn"])
        best_knn = max(self.progress.best_knn, row.get("knn", -1.0))
        is_best = best_knn > self.progress.best_knn
        self.progress = dataclasses.replace(
            self.progress, epoch=epoch + 1, samples=0, totals=None, best_knn=best_knn
        )
        self.totals = EpochMeans()
        self.log.epoch(row)
        if distributed.is_main():
            draw_curves(self.log.rows, self.folder / "curves.png")
            write_run_page(self.folder, self.log.rows, f"{self.options.arch} on {self.options.data_path}")
        # First those that are kept: once checkpoint.pth says that the epoch is over, nobody returns to it.
        if is_best:
            self._save("best_knn.pth")
        if self.options.saveckp_freq > 0 and epoch % self.options.saveckp_freq == 0:
            self._save(f"checkpoint{epoch:04}.pth")
        self._save()

    def _looks_after(self, epochs: int) -> bool:
        every = self.options.knn_freq
        return every > 0 and (epochs % every == 0 or epochs == self.options.epochs)

    def _look(self, epochs: int) -> dict[str, float]:
        """k-NN and attention of the teacher, whose features are the better ones (DINO, section 5.2)."""
        return self.monitor.look(self.distillation.teacher.backbone, epochs=epochs) if self.monitor else {}

    def _look_before(self) -> None:
        """At the random network, for all that follows to be compared with."""
        if not self.progress.epoch and not self.progress.samples:
            knn = self._look(0).get("knn")
            if not self.options.init_from:
                self.progress = dataclasses.replace(self.progress, knn_random=knn)
                return
            # The best network so far is the one that was given.
            best = -1.0 if knn is None else knn
            self.progress = dataclasses.replace(self.progress, knn_init=knn, best_knn=best)
            if knn is None:
                way = "give --knn_data, with classes" if self.monitor else "give a --knn_freq above 0"
                self.log.say(f"no k-NN accuracy to tell whether anything is lost: {way}")

    def _watch_for_forgetting(self, knn: float) -> None:
        before, allowed = self.progress.knn_init, self.options.knn_drop
        if before is not None and knn < before - allowed:
            self.log.say(
                f"FORGETTING: k-NN accuracy is {knn:.1f} %, {before - knn:.1f} points below that of "
                f"{self.options.init_from} before the training, and --knn_drop allows {allowed:g}: lower --lr, raise "
                "--momentum_teacher, or stop here; --preset continue is made for this"
            )

    def _watch_for_collapse(self, measures: Mapping[str, float]) -> None:
        """Name each kind of failure once."""
        self.watch.update(measures)
        verdict = self.watch.verdict()
        kind = verdict.partition(":")[0] if verdict else ""
        if not kind or kind in self.collapses:
            return
        self.collapses.add(kind)
        self.log.say(f"COLLAPSE: {verdict}")
        if self.options.on_collapse == "stop":
            self._save()
            raise RunStopped(f"stopped by --on_collapse stop: {verdict}")

    def _stop_nonfinite(self, step: int, views: list[Tensor]) -> None:
        self._save()
        rates = self.plan.rates(step)
        parts = zip(*(view.tensor_split(self.options.accumulate) for view in views), strict=True)
        with distributed.autocast(self.device, self.precision):
            where = source_of_nonfinite(self.distillation.student, parts)
        raise RunStopped(
            f"{_NONFINITE_STEPS_ALLOWED} steps in a row were not finite, the last is step {step} (learning rate "
            f"{rates.lr:.2e}, weight decay {rates.weight_decay:.2e}, teacher temperature "
            f"{rates.teacher_temperature:.3f}); {where}; the weights before them are saved in {self.folder}. "
            "Lower --lr, or try --precision fp32"
        )

    def _is_due(self) -> bool:
        minutes = self.options.save_every_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def _save(self, name: str = checkpoint.NAME) -> None:
        self.saved_at = time.monotonic()
        if not distributed.is_main():
            return
        totals = EpochMeans(self.totals.sums)
        for result in self.unread:  # they are done, and in the weights
            _count(totals, result)
        content = checkpoint.pack(
            self.distillation.student,
            self.distillation.teacher,
            self.distillation.optimizer,
            self.distillation.center.center,
            progress=dataclasses.replace(
                self.progress, totals=totals.sums if self.progress.samples else None
            ),
            args=dataclasses.asdict(self.options),
            scaler=self.distillation.scaler,
        )
        if name == checkpoint.NAME:
            checkpoint.save_latest(content, self.folder)
        else:
            checkpoint.save_atomically(content, self.folder / name)

    def _steps_done(self) -> int:
        """Of the whole run, as many as make its pictures with the present batch."""
        within = min(self.progress.samples // self.global_batch, self.plan.steps_per_epoch)
        return self.progress.epoch * self.plan.steps_per_epoch + within

    def _epoch_has_a_step(self) -> bool:
        return self.progress.samples + self.global_batch <= len(self.pictures)


def _count(totals: EpochMeans, result: StepResult) -> None:
    if result.finite:
        totals.add(result.measures)
    else:
        totals.skip()
