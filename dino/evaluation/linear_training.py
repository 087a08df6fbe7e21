"""DINO's linear evaluation (section 4.1): random crops and flips through the frozen backbone, SGD, cosine.

Its files too: `checkpoint.pth.tar` and `log.txt`. A run that was stopped continues from its last whole epoch.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino.evaluation.extraction import Extractor
from dino.evaluation.linear_classifier import (
    LinearClassifier,
    ProbedTokens,
    Scores,
    classifier_from,
    classifier_state,
    score,
)
from dino.evaluation.random_crops import RandomCrops
from dino.runtime import checkpoint, distributed
from dino.runtime.distributed import mean_over_ranks
from dino.runtime.options import RunStopped, UserError
from dino.runtime.pictures import Pictures
from dino.runtime.run_log import RunLog

NAME = "checkpoint.pth.tar"

_MOMENTUM = 0.9
_BATCH_OF_LR = 256  # --lr is for so many pictures per step


@dataclass(frozen=True)
class LinearTraining:
    """The settings, under the names of DINO's eval_linear.py.

    Attributes:
        lr: at the beginning, for 256 pictures per step: scaled with the number of them.
        batch_size: pictures per step and process.
        val_freq: epochs from one look at the val pictures to the next.
    """

    epochs: int = 100
    lr: float = 0.001
    batch_size: int = 128
    val_freq: int = 1
    seed: int = 0
    num_workers: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """What a run ends with.

    Attributes:
        last: scores of the classifier at the end.
        best_top1: highest of all looks, which DINO reports; it is chosen on the val pictures.
        broken: training pictures that could not be read.
    """

    last: Scores
    best_top1: float
    broken: list[str]


def train_classifier(
    extractor: Extractor,
    tokens_of: ProbedTokens,
    train: Pictures,
    val: Pictures,
    numbers: np.ndarray,
    settings: LinearTraining,
    folder: Path,
    *,
    num_classes: int,
    backbone_sha256: str,
    say: Callable[[str], None],
) -> Trained:
    """Train, or continue what is in `folder`. To be called by all processes.

    Args:
        numbers: (classes of val,) int64: which output each class is.
        num_classes: outputs of the classifier.
        backbone_sha256: a checkpoint of another backbone is refused.
        say: prints a line.

    Raises:
        UserError: pictures, settings or the checkpoint do not fit.
        RunStopped: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    classifier = LinearClassifier(tokens_of.width(extractor), num_classes, generator)
    classifier.classes = tuple(train.classes)
    state = _State(classifier.to(extractor.device), settings, backbone_sha256)
    with distributed.together():
        if (folder / NAME).exists():
            state.resume(folder / NAME)
            say(f"continuing {folder / NAME} after epoch {state.epoch} of {settings.epochs}")
    crops = RandomCrops(
        train,
        size=extractor.preparation.size,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_workers=settings.num_workers,
        pin_memory=extractor.device.type == "cuda",
    )
    log = RunLog(
        folder,
        steps=len(crops) * settings.epochs,
        first_step=len(crops) * state.epoch,
        first_epoch=state.epoch,
        pictures_per_step=settings.batch_size * distributed.world_size(),
        active=distributed.is_main(),
    )
    broken: set[str] = set()
    scores: Scores | None = None
    val_title = "val pictures" if sys.stderr.isatty() else None  # below the bar of the steps
    try:
        if state.epoch < settings.epochs:
            log.start()
        while state.epoch < settings.epochs:
            row = _train_epoch(extractor, tokens_of, state, crops, log, broken)
            if row["epoch"] % settings.val_freq == 0 or state.epoch == settings.epochs:
                scores = score(extractor, tokens_of, classifier, val, numbers, progress=val_title)
                state.best = max(state.best, scores.top1)
                row |= _logged(scores)
                accuracy = f"of the network on the {len(val)} test images: {scores.top1:.1f}%"
                log.say(f"Accuracy at epoch {row['epoch']} {accuracy}")
                log.say(f"Max accuracy so far: {state.best:.2f}%")
            log.epoch(row)
            with distributed.together():
                if distributed.is_main():
                    checkpoint.save_atomically(state.packed(), folder / NAME)
    finally:
        log.close()
    if scores is None:
        say("nothing to train: all epochs are done; a larger --epochs continues")
        scores = score(extractor, tokens_of, classifier, val, numbers, progress="val pictures")
    return Trained(scores, state.best, sorted(set(distributed.gather(sorted(broken)))))


class _State:
    """What a checkpoint holds: the classifier, what trains it, epochs done, and the best accuracy so far."""

    def __init__(self, classifier: LinearClassifier, settings: LinearTraining, backbone_sha256: str) -> None:
        batch = settings.batch_size * distributed.world_size()
        self.classifier = classifier
        self.optimizer = torch.optim.SGD(
            classifier.parameters(), settings.lr * batch / _BATCH_OF_LR, momentum=_MOMENTUM, weight_decay=0
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings.epochs, eta_min=0
        )
        self.backbone_sha256 = backbone_sha256
        self.epoch = 0
        self.best = 0.0

    def packed(self) -> dict[str, Any]:
        """Under the names of DINO's files."""
        return {
            "epoch": self.epoch,
            "state_dict": classifier_state(self.classifier),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_acc": self.best,
            "classes": list(self.classifier.classes),
            "backbone_sha256": self.backbone_sha256,
        }

    def resume(self, path: Path) -> None:
        """Fill all parts from a file, or none.

        Raises:
            UserError: it is damaged, or of another backbone, or of other classes.
        """
        content = checkpoint.load(path)
        made_with = content.get("backbone_sha256", self.backbone_sha256)  # DINO's files do not say
        if made_with != self.backbone_sha256:
            raise UserError(
                f"{path} was trained on another backbone ({made_with[:8]}..., this is {self.backbone_sha256[:8]}...); "
                "name another --output_dir, or remove it"
            )
        wanted = self.classifier.linear
        stored = classifier_from(content, wanted.in_features, str(path))
        if stored.linear.out_features != wanted.out_features:
            raise UserError(
                f"{path} is for {stored.linear.out_features} classes, these pictures ask for {wanted.out_features}; "
                "name another --output_dir, or remove it"
            )
        if stored.classes not in ((), self.classifier.classes):
            raise UserError(
                f"{path} is for the classes {', '.join(stored.classes[:5])}, these pictures have "
                f"{', '.join(self.classifier.classes[:5])}; name another --output_dir, or remove it"
            )
        try:
            epoch, best, schedule = int(content["epoch"]), float(content["best_acc"]), content["scheduler"]
            asked = (self.scheduler.T_max, self.scheduler.base_lrs)
            self.optimizer.load_state_dict(content["optimizer"])
            self.scheduler.load_state_dict(schedule)
            if asked != (schedule["T_max"], schedule["base_lrs"]):
                self._reschedule(epoch, *asked)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path} lacks what it takes to continue ({error}); remove it to start anew"
            ) from error
        self.classifier.load_state_dict(stored.state_dict())
        self.epoch, self.best = epoch, best

    def _reschedule(self, epoch: int, epochs: int, base_lrs: list[Any]) -> None:
        """Another --epochs, --lr or number of pictures per step than before: go on where their schedule is then."""
        self.scheduler.T_max, self.scheduler.base_lrs = epochs, base_lrs
        for group, base in zip(self.optimizer.param_groups, base_lrs, strict=True):
            group["initial_lr"] = base
            group["lr"] = base * (1 + math.cos(math.pi * epoch / epochs)) / 2


def _train_epoch(
    extractor: Extractor,
    tokens_of: ProbedTokens,
    state: _State,
    crops: RandomCrops,
    log: RunLog,
    broken: set[str],
) -> dict[str, Any]:
    """The next epoch; returns its line for `log.txt`, under DINO's names.

    Raises:
        UserError: no picture can be read.
        RunStopped: the loss is not finite.
    """
    epoch, rate, losses, seen = state.epoch, state.optimizer.param_groups[0]["lr"], [], 0
    for images, labels, messages in crops.epoch(epoch):
        broken.update(messages)
        seen += len(labels)
        losses.append(_step(extractor, tokens_of, state, images, labels))
        log.step(epoch, losses[-1])
    if not sum(distributed.gather([seen])):
        raise UserError(f"none of the training pictures can be read; {min(broken)}")
    state.scheduler.step()
    state.epoch += 1
    return {"train_lr": rate, "train_loss": float(np.mean(losses)), "epoch": epoch}


def _step(
    extractor: Extractor, tokens_of: ProbedTokens, state: _State, images: Tensor | None, labels: Tensor
) -> float:
    """One step of all processes; returns their mean loss."""
    state.optimizer.zero_grad()
    loss = torch.zeros((), device=extractor.device)
    if images is not None:
        with torch.no_grad():
            features = extractor.run(images, tokens_of)
        loss = F.cross_entropy(state.classifier(features), labels.to(extractor.device))
        loss.backward()
    for parameter in state.classifier.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = mean_over_ranks(gradient)
    mean = float(mean_over_ranks(loss.detach()))
    if not math.isfinite(mean):
        raise RunStopped(f"the loss is {mean}: lower --lr; the last whole epoch is kept")
    state.optimizer.step()
    return mean


def _logged(scores: Scores) -> dict[str, float]:
    five = {} if scores.top5 is None else {"test_acc5": scores.top5}
    return {"test_loss": scores.loss, "test_acc1": scores.top1, **five}
