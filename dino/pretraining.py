"""The pre-training run: build the parts from the options, continue what is in the output folder, loop.

`dino.train` is the command; one step of the method is in `dino.distillation`.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dino.collapse import CollapseWatch
from dino.distillation import Rates, first_nonfinite_module, teacher_of
from dino.loader import Batch, BrokenPictures, EpochOrder, create_loader, mixed_seed
from dino.memory import step_memory
from dino.monitor import NEIGHBOURS, Monitor, open_parts
from dino.multicrop import MultiCrop
from dino.plan import check_options, create_distillation, create_plan
from dino.runtime import checkpoint, distributed
from dino.runtime.backbones import load_backbone_weights
from dino.runtime.options import RunStopped, UserError
from dino.runtime.pictures import open_pictures
from dino.runtime.run_log import EpochMeans, RunLog
from dino.train import TrainOptions, preset_text

_NONFINITE_STEPS_ALLOWED = 10
# Even a crop of 5 % of a picture with this many times the global view's side is larger than a local view.
_ENOUGH_FOR_CROPS = 4
# Steps in a row that must look collapsed before it is called so.
_COLLAPSE_PATIENCE = 50


def pretrain(options: TrainOptions) -> None:
    """Run or continue a pre-training.

    Raises:
        UserError: options, pictures or files that do not fit; nothing on disk is changed.
        RunStopped: the run ended early for a stated reason, after saving.
    """
    check_options(options)
    device = distributed.pick_device(options.device, options.local_rank)
    folder = _writable_folder(Path(options.output_dir))
    distributed.start(device, dist_url=options.dist_url)
    try:
        Pretraining(options, folder, device).run()
    finally:
        distributed.stop()


class Pretraining:
    """One run in one folder."""

    def __init__(self, options: TrainOptions, folder: Path, device: torch.device) -> None:
        self.options = options
        self.folder = folder
        self.device = device
        self.precision = distributed.pick_precision(
            options.precision if options.precision != "auto" or options.use_fp16 else "fp32", device
        )
        self.workers = distributed.share_cores(device, options.num_workers)
        self.pictures = open_pictures(options.data_path)
        self.global_batch = options.batch_size_per_gpu * distributed.world_size()
        self.plan = create_plan(options, len(self.pictures), self.global_batch)
        self.crop = MultiCrop(
            global_size=options.global_crops_size,
            local_size=options.local_crops_size,
            global_scale=options.global_crops_scale,
            local_scale=options.local_crops_scale,
            local_number=options.local_crops_number,
            jitter=options.color_jitter,
            blur=options.blur,
        )
        self.distillation = create_distillation(options, device, self.precision)
        self.broken = BrokenPictures(options.max_broken)
        self.progress = checkpoint.Progress(epoch=0)
        self.notes = self._resume_or_start()
        self.knn_before: float | None = None
        self.watch = CollapseWatch(
            options.out_dim,
            patience_steps=_COLLAPSE_PATIENCE,
            ignore_steps=max(self.plan.held_steps, options.warmup_epochs * self.plan.steps_per_epoch),
        )

    @property
    def first_step(self) -> int:
        return self.progress.epoch * self.plan.steps_per_epoch + self.progress.samples // self.global_batch

    def run(self) -> None:
        """From where the run stands to its end."""
        self.log = RunLog(
            self.folder,
            steps=self.plan.steps,
            first_step=self.first_step,
            first_epoch=self.progress.epoch,
            pictures_per_step=self.global_batch,
            active=distributed.is_main(),
        )
        try:
            for line in [*self._summary(), *self.notes]:
                self.log.say(line)
            self.monitor = self._create_monitor()
            if self.first_step == 0 and self.options.knn_freq > 0:
                self.knn_before = self._look(0).get("knn")
            self._train()
        finally:
            self.log.close()
        if distributed.is_main():
            print(*self._closing_lines(), sep="\n")

    def _train(self) -> None:
        totals = EpochMeans(self.progress.totals)
        saved_at = time.monotonic()
        nonfinite_in_a_row = 0
        for step, batch in self._batches():
            rates = self.plan.rates(step)
            views = [view.to(self.device, non_blocking=True) for view in batch.views]
            # The state of the generator is a function of the step: nothing of it needs to be saved.
            torch.manual_seed(mixed_seed(self.options.seed, step, distributed.rank()))
            result = self.distillation.step(views, rates)

            epoch, step_in_epoch = divmod(step, self.plan.steps_per_epoch)
            self.log.step(epoch, result.measures["loss"])
            if result.finite:
                nonfinite_in_a_row = 0
                totals.add(result.measures)
                self._watch_for_collapse(result.measures)
            else:
                nonfinite_in_a_row += 1
                self.log.say(f"step {step}: loss or gradients are not finite; the step is skipped")
                totals.skip()
            self.progress = dataclasses.replace(
                self.progress,
                epoch=epoch,
                samples=(step_in_epoch + 1) * self.global_batch,
                totals=totals.sums,
            )
            if nonfinite_in_a_row >= _NONFINITE_STEPS_ALLOWED:
                self._stop_nonfinite(step, rates, views)
            if step_in_epoch + 1 == self.plan.steps_per_epoch:
                self._end_epoch(epoch, rates, totals)
                totals = EpochMeans()
                saved_at = time.monotonic()
            elif self._is_due(saved_at):
                self._save()
                saved_at = time.monotonic()

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
        loader = create_loader(
            self.pictures,
            self.crop,
            order,
            enough=_ENOUGH_FOR_CROPS * self.options.global_crops_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for step, batch in enumerate(loader, start=self.first_step):
            for line in self.broken.add(batch.broken):
                self.log.say(line)
            self.broken.check()
            if not batch.views:
                raise UserError(f"no readable picture is left for step {step}: see the list above")
            yield step, batch

    def _end_epoch(self, epoch: int, rates: Rates, totals: "EpochMeans") -> None:
        self.progress = checkpoint.Progress(epoch=epoch + 1, best_knn=self.progress.best_knn)
        means = totals.means()
        row = {
            "epoch": epoch,
            "train_loss": means.pop("loss", None),
            "train_lr": rates.lr,
            "train_wd": rates.weight_decay,
            **means,
            "teacher_temperature": rates.teacher_temperature,
            "momentum": rates.momentum,
            "skipped_steps": totals.skipped,
        }
        found = self._look(epoch + 1) if self._should_look(epoch + 1) else {}
        best = found.get("knn", -1.0) > self.progress.best_knn
        if best:
            self.progress = dataclasses.replace(self.progress, best_knn=found["knn"])
        self.log.epoch(row | found)
        if self.monitor:
            self.monitor.draw_curves(self.log.rows)
        self._save()
        if best:
            self._save("best_knn.pth")
        if self.options.saveckp_freq > 0 and epoch % self.options.saveckp_freq == 0:
            self._save(f"checkpoint{epoch:04}.pth")

    def _should_look(self, epochs_done: int) -> bool:
        last = epochs_done == self.options.epochs
        return self.options.knn_freq > 0 and (last or epochs_done % self.options.knn_freq == 0)

    def _look(self, epochs_done: int) -> dict[str, float]:
        """k-NN and attention of the teacher, whose features are the better ones (DINO, section 5.2)."""
        if not self.monitor:
            return {}
        return self.monitor.look(self.distillation.teacher.backbone, epoch=epochs_done)

    def _create_monitor(self) -> Monitor | None:
        if not distributed.is_main():
            return None
        options = self.options
        train, test = open_parts(options.knn_data or options.data_path)
        return Monitor(
            self.folder,
            train,
            test,
            max_pictures=options.knn_max_pictures,
            size=options.eval_size or options.global_crops_size,
            device=self.device,
            precision=self.precision,
            num_workers=self.workers,
            say=self.log.say,
        )

    def _watch_for_collapse(self, measures: dict[str, float]) -> None:
        said = self.watch.verdict()
        self.watch.update(measures)
        verdict = self.watch.verdict()
        if verdict and not said:
            self.log.say(f"COLLAPSE: {verdict}")
            if self.options.on_collapse == "stop":
                self._save()
                raise RunStopped(f"stopped by --on_collapse stop: {verdict}")

    def _stop_nonfinite(self, step: int, rates: Rates, views: list[torch.Tensor]) -> None:
        self._save()
        module = first_nonfinite_module(self.distillation.student, views)
        where = (
            f"the first module with a non-finite output is {module}" if module else "all modules' are finite"
        )
        raise RunStopped(
            f"{_NONFINITE_STEPS_ALLOWED} steps in a row were not finite, the last is step {step} (learning rate "
            f"{rates.lr:.2e}, weight decay {rates.weight_decay:.2e}, teacher temperature "
            f"{rates.teacher_temperature:.3f}); {where}; the weights before them are saved in {self.folder}. "
            "Lower --lr, or try --precision fp32"
        )

    def _closing_lines(self) -> list[str]:
        """What came out, and where to look."""
        measured = [row["knn"] for row in self.log.rows if "knn" in row]
        lines = []
        if measured and self.knn_before is not None:
            lines.append(
                f"{NEIGHBOURS}-NN accuracy: {self.knn_before:.1f} % before, {measured[-1]:.1f} % after"
            )
        found = [name for name in ("curves.png", "attention", "log.txt") if (self.folder / name).exists()]
        lines.append(f"checkpoint, {', '.join(found)} are in {self.folder.resolve()}")
        return lines

    def _is_due(self, saved_at: float) -> bool:
        minutes = self.options.save_every_minutes
        return minutes > 0 and time.monotonic() - saved_at >= 60 * minutes

    def _save(self, name: str = checkpoint.NAME) -> None:
        if not distributed.is_main():
            return
        content = checkpoint.pack(
            self.distillation.student,
            self.distillation.teacher,
            self.distillation.optimizer,
            self.distillation.center.center,
            progress=self.progress,
            args=dataclasses.asdict(self.options),
        )
        if name == checkpoint.NAME:
            checkpoint.save_latest(content, self.folder)
        else:
            checkpoint.save_atomically(content, self.folder / name)

    def _resume_or_start(self) -> list[str]:
        """Continue the folder's run, or start from `--init_from`, or from random weights; returns what was done."""
        content, note = checkpoint.load_latest(self.folder)
        parts = self.distillation
        if content is not None:
            stored = content.get("args") or {}
            stored = stored if isinstance(stored, dict) else vars(stored)
            for name in ("arch", "optimizer"):
                ours = getattr(self.options, name)
                if stored.get(name, ours) != ours:
                    raise UserError(
                        f"{self.folder} holds a run with --{name} {stored[name]}, this one has --{name} {ours}: "
                        "give the same, or another --output_dir"
                    )
            self.progress = checkpoint.unpack(
                content, parts.student, parts.teacher, parts.optimizer, parts.center.center
            )
            place = f"epoch {self.progress.epoch}, picture {self.progress.samples} of it"
            return [line for line in (note, f"resumed from {self.folder} at {place}") if line]
        if self.options.init_from:
            report = load_backbone_weights(
                parts.student.backbone,
                self.options.init_from,
                key=self.options.init_key,
                allow_partial=self.options.allow_partial,
            )
            teacher_of(parts.student, parts.teacher)
            return [f"backbone: {report}"]
        return []

    def _summary(self) -> list[str]:
        """What the run understood, in a few lines."""
        options, plan = self.options, self.plan
        classes = (
            f" in {len(self.pictures.classes)} classes" if self.pictures.labels is not None else ", no labels"
        )
        sizes = [view.size for view in self.crop.views]
        needed = step_memory(
            self.distillation.student,
            sizes,
            options.batch_size_per_gpu,
            low_precision=self.precision != "fp32",
        )
        parameters = sum(parameter.numel() for parameter in self.distillation.student.backbone.parameters())
        lines = [
            f"pictures:  {len(self.pictures):,}{classes}, from {options.data_path}",
            f"backbone:  {options.arch}, {parameters / 1e6:.1f} M parameters, {options.out_dim} prototypes",
            f"views:     2 x {options.global_crops_size} px, {options.local_crops_number} x "
            f"{options.local_crops_size} px",
            f"steps:     {plan.steps_per_epoch:,} per epoch of {self.global_batch} pictures "
            f"({distributed.world_size()} process(es) x {options.batch_size_per_gpu}), {plan.steps:,} in all",
            f"rates:     learning rate {options.lr:g} x {self.global_batch} / 256 = {plan.lr.max():.3g} at its peak",
            f"computing: {self.device}, {self.precision}, about {needed / 2**30:.2f} GiB per process for a step",
            f"output:    {self.folder.resolve()}",
        ]
        if options.preset != "paper":
            lines.insert(0, f"preset:    {options.preset}: {preset_text(options.preset)}")
        return lines


def _writable_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into --output_dir {folder}: {error.strerror}") from error
    return folder
