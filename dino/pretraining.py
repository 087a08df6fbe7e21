"""The pre-training run: build the parts from the options, continue what is in the output folder, loop.

`dino.train` is the command; one step of the method is in `dino.distillation`.
"""

import dataclasses
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dino.collapse import CollapseWatch
from dino.distillation import Rates, StepResult, first_nonfinite_module, teacher_of
from dino.loader import Batch, BrokenPictures, EpochOrder, create_loader, mixed_seed
from dino.monitor import Monitor, open_parts
from dino.multicrop import MultiCrop
from dino.plan import check_options, create_distillation, create_plan
from dino.runtime import checkpoint, distributed
from dino.runtime.backbones import load_backbone_weights
from dino.runtime.options import RunStopped, UserError
from dino.runtime.pictures import open_pictures
from dino.runtime.run_log import EpochMeans, RunLog
from dino.summary import closing_lines, opening_lines
from dino.train import TrainOptions

_NONFINITE_STEPS_ALLOWED = 10
# Even a crop of 5 % of a picture with this many times the global view's side is larger than a local view.
_ENOUGH_FOR_CROPS = 4
# Steps in a row that must look collapsed before it is called so.
_COLLAPSE_PATIENCE = 50
# A run that continues may be given other values of these without being asked why.
_OF_THE_MACHINE = {"data_path", "output_dir", "num_workers", "dist_url", "local_rank", "device", "preset"}


def pretrain(options: TrainOptions) -> None:
    """Run or continue a pre-training.

    Raises:
        UserError: options, pictures or files that do not fit; no file of an earlier run is changed.
        RunStopped: the run ended early for a stated reason, after saving.
    """
    device = distributed.pick_device(options.device, options.local_rank)
    distributed.start(device, dist_url=options.dist_url)
    try:
        Pretraining(options, device).run()
    except (UserError, RunStopped) as reason:
        if distributed.is_main():
            raise
        # All processes share what is raised here, and one says it.
        raise SystemExit(2 if isinstance(reason, UserError) else 1) from None
    finally:
        distributed.stop()


class Pretraining:
    """One run in one folder."""

    def __init__(self, options: TrainOptions, device: torch.device) -> None:
        self.options = options
        self.device = device
        self.folder = Path(options.output_dir)
        with distributed.together():
            check_options(options)
            _make_writable(self.folder)
        full_precision = options.precision == "auto" and not options.use_fp16
        self.precision = distributed.pick_precision("fp32" if full_precision else options.precision, device)
        self.workers = distributed.share_cores(device, options.num_workers)
        self.global_batch = options.batch_size_per_gpu * distributed.world_size()
        self.distillation = create_distillation(options, device, self.precision)
        self.progress = checkpoint.Progress(epoch=0)
        with distributed.together():
            self.pictures = open_pictures(options.data_path)
            self.plan = create_plan(options, len(self.pictures), self.global_batch)
            self.monitor = self._create_monitor()
            self.notes = self._resume_or_start()
        self.first_step = self._agreed_first_step()
        self.totals = EpochMeans(self.progress.totals)
        self.broken = BrokenPictures(options.max_broken)
        self.watch = CollapseWatch(
            options.out_dim,
            patience_steps=_COLLAPSE_PATIENCE,
            ignore_steps=max(self.plan.unsettled_steps - self.first_step, 0),
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
            for line in [*opening, *self.notes]:
                self.log.say(line)
            if self._step_in_epoch() == self.plan.steps_per_epoch:
                self._end_epoch()  # what was left to do when the run was killed
            if self.first_step < self.plan.steps:
                self.knn_before = self._knn_before()
                self._train()
            else:
                self.log.say("nothing to train: all epochs are done; a larger --epochs continues")
        finally:
            self.log.close()
        if distributed.is_main():
            print(*closing_lines(self.folder, self.log.rows), sep="\n")

    def _train(self) -> None:
        for step, batch in self._batches():
            rates = self.plan.rates(step)
            views = [view.to(self.device, non_blocking=True) for view in batch.views]
            # The state of the generator is a function of the step: nothing of it needs to be saved.
            torch.manual_seed(mixed_seed(self.options.seed, step, distributed.rank()))
            result = self.distillation.step(views, rates)
            self._take_note(step, result)
            if self.nonfinite_in_a_row >= _NONFINITE_STEPS_ALLOWED:
                self._stop_nonfinite(step, rates, views)
            if self._step_in_epoch() == self.plan.steps_per_epoch:
                self._end_epoch()
            elif self._is_due():
                self._save()

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        order = EpochOrder(
            len(self.pictures),
            batch_size=self.options.batch_size_per_gpu,
            steps=self.plan.steps,
            first_step=self.first_step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=self.options.seed,
        )
        crop = MultiCrop(
            global_size=self.options.global_crops_size,
            local_size=self.options.local_crops_size,
            global_scale=self.options.global_crops_scale,
            local_scale=self.options.local_crops_scale,
            local_number=self.options.local_crops_number,
            jitter=self.options.color_jitter,
            blur=self.options.blur,
        )
        loader = create_loader(
            self.pictures,
            crop,
            order,
            enough=_ENOUGH_FOR_CROPS * self.options.global_crops_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for step, batch in enumerate(loader, start=self.first_step):
            # Every process counts what all have found, so that all stop at the same step.
            for line in self.broken.add(distributed.gather(batch.broken)):
                self.log.say(line)
            self._check_readable(step, batch)
            yield step, batch

    def _check_readable(self, step: int, batch: Batch) -> None:
        try:
            self.broken.check()
            if distributed.gather([] if batch.views else [step]):
                raise UserError(f"no readable picture is left for step {step}: see the list above")
        except UserError:
            if step > self.first_step:
                self._save()
            raise

    def _take_note(self, step: int, result: StepResult) -> None:
        epoch, step_in_epoch = divmod(step, self.plan.steps_per_epoch)
        self.log.step(epoch, result.measures["loss"])
        if result.finite:
            self.nonfinite_in_a_row = 0
            self.totals.add(result.measures)
        else:
            self.nonfinite_in_a_row += 1
            self.totals.skip()
            self.log.say(f"step {step}: loss or gradients are not finite; the step is skipped")
        samples = (step_in_epoch + 1) * self.global_batch
        self.progress = dataclasses.replace(
            self.progress, epoch=epoch, samples=samples, totals=self.totals.sums
        )
        if result.finite:
            self._watch_for_collapse(result.measures)

    def _end_epoch(self) -> None:
        epoch = self.progress.epoch
        looks = self._looks_after(epoch + 1)
        if looks:
            self._save()  # looking takes a while, and the epoch is worth more than a look
        steps = slice(epoch * self.plan.steps_per_epoch, (epoch + 1) * self.plan.steps_per_epoch)
        means = self.totals.means()
        row: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": means.pop("loss", None),
            "train_lr": float(self.plan.lr[steps].mean()),
            "train_wd": float(self.plan.weight_decay[steps].mean()),
            **means,
            "teacher_temperature": float(self.plan.teacher_temperature[steps].mean()),
            "momentum": float(self.plan.momentum[steps].mean()),
            "skipped_steps": self.totals.skipped,
        }
        if looks:
            row |= self._look(epoch + 1)
        best_knn = max(self.progress.best_knn, row.get("knn", -1.0))
        is_best = best_knn > self.progress.best_knn
        self.progress = checkpoint.Progress(epoch=epoch + 1, best_knn=best_knn)
        self.totals = EpochMeans()
        self.log.epoch(row)
        if self.monitor:
            self.monitor.draw_curves(self.log.rows)
        self._save()
        if is_best:
            self._save("best_knn.pth")
        if self.options.saveckp_freq > 0 and epoch % self.options.saveckp_freq == 0:
            self._save(f"checkpoint{epoch:04}.pth")
