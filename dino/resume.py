"""Where a run starts: at the checkpoint in its folder, else from given weights, else from random ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino.distillation import SelfDistillation, teacher_of
from dino.runtime import checkpoint, distributed
from dino.runtime.backbones import load_backbone_weights
from dino.runtime.changed_options import changed_options, changes_line, stored_options
from dino.runtime.options import UserError
from dino.train_options import TrainOptions

# With another value of these the checkpoint is of no use.
_MUST_STAY = {"arch", "optimizer"}
# These may differ on another machine without it being another run.
_OF_THE_MACHINE = {
    "data_path",
    "output_dir",
    "num_workers",
    "dist_url",
    "local_rank",
    "device",
    "preset",
    "compile",
    "augment_on",
}


def resume_or_start(
    parts: SelfDistillation, folder: Path, options: TrainOptions
) -> tuple[checkpoint.Progress, list[str]]:
    """Fill `parts`; returns where the run stands, and what was done, in a line or two.

    Raises:
        UserError: the folder's checkpoint, or the weights of `--init_from`, cannot be read or do not fit.
    """
    content, note = checkpoint.load_latest(folder)
    if content is not None:
        progress, lines = _resume(parts, content, folder, options)
        return progress, [*([note] if note else []), *lines]
    if not options.init_from:
        return checkpoint.Progress(epoch=0), []
    report = load_backbone_weights(
        parts.student.backbone, options.init_from, key=options.init_key, allow_partial=options.allow_partial
    )
    teacher_of(parts.student, parts.teacher)
    return checkpoint.Progress(epoch=0), [f"weights:   {report}"]


def check_agreement(progress: checkpoint.Progress, pictures: int, precision: str) -> None:
    """All processes must have found the same; each gives what it has.

    Raises:
        UserError: in all of them, what they have to have in common.
    """
    if len(set(distributed.gather([(progress.epoch, progress.samples)]))) > 1:
        raise UserError(
            "the processes found different checkpoints: all machines must see the same --output_dir"
        )
    if len(set(distributed.gather([pictures]))) > 1:
        raise UserError(
            "the processes found different numbers of pictures: all must see the same --data_path"
        )
    precisions = sorted(set(distributed.gather([precision])))
    if len(precisions) > 1:
        raise UserError(
            f"the processes would compute in {' and '.join(precisions)}: give one with --precision"
        )


def new_pictures(progress: checkpoint.Progress, now: int) -> list[str]:
    """A line when the set has another number of pictures than the run has been trained on."""
    if progress.pictures in (0, now):
        return []
    rest = ", so what is left of its epoch comes in another order" if progress.samples else ""
    return [f"pictures:  {progress.pictures:,} when it was saved, {now:,} now{rest}"]


def _resume(
    parts: SelfDistillation, content: Mapping[str, Any], folder: Path, options: TrainOptions
) -> tuple[checkpoint.Progress, list[str]]:
    stored = stored_options(content.get("args"))
    if options.init_from and options.init_from != stored.get("init_from"):
        raise UserError(
            f"{folder} holds a run that did not start from {options.init_from}: leave out --init_from to continue "
            "it, or give another --output_dir"
        )
    changed = changed_options(stored, options, besides=_OF_THE_MACHINE | {"init_from"})
    # The original's names for backbones are not all ours; whether its weights fit is seen below.
    if "progress" not in content:
        changed.pop("arch", None)
    for name in sorted(changed.keys() & _MUST_STAY):
        before, now = changed[name]
        raise UserError(
            f"{folder} holds a run with --{name} {before}, this one has --{name} {now}: "
            "give the same, or another --output_dir"
        )
    progress = checkpoint.unpack(
        content, parts.student, parts.teacher, parts.optimizer, parts.center.center, parts.scaler
    )
    within = f" and {progress.samples:,} pictures of the next" if progress.samples else ""
    lines = [f"resumed:   {folder} after {progress.epoch} epochs{within}"]
    if changed:
        lines.append(changes_line(changed))
    return progress, lines
