"""Did a run learn? A finished run against its own random start, on the same pictures.

python benchmarks/learning.py --runs runs/demo_0 runs/demo_1 runs/demo_2 --data_path demo

For each run folder: 20-NN and logistic regression on the class token and on the mean of the patch tokens, before
(the random network of the run's seed) and after, with McNemar's exact test on the same validation pictures; then over
all runs together, with Wilcoxon's signed-rank test on each picture's sum. For `demo`, which has object masks, also the
attention mass on the object over the object's area, of the head that is best on training pictures, beside a centred
disc of the same area.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dino.attention.jaccard import object_score
from dino.attention.maps import attention_maps, patch_side, resize
from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.kinds import CLASS_TOKEN, PATCH_MEAN
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.labelled_sets import class_numbers, open_train_and_val
from dino.evaluation.logistic import logistic_accuracy
from dino.evaluation.paired import paired_difference, paired_difference_over_runs
from dino.evaluation.results import provenance
from dino.plan import create_distillation
from dino.runtime import checkpoint
from dino.runtime.demo_pictures import DemoPictures
from dino.runtime.distributed import describe
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option
from dino.runtime.pictures import Pictures
from dino.train_options import TrainOptions

_NEIGHBOURS = 20
_SCORED_PICTURES = 200
_ATTENTION_RESOLUTION = 3  # times the side that features are taken at, as on the run's sheets


@dataclass(frozen=True)
class LearningOptions:
    runs: tuple[str, ...] = option((), "Folders of finished runs, one per seed.")
    data_path: str = option("demo", "Labelled pictures: a folder with train/ and val/, or demo.")
    eval_size: int = option(0, "Side in pixels of what the networks see; 0 = the run's own --eval_size.")
    output: str = option("", "Write the numbers to this JSON file too; empty = no file.")


@dataclass(frozen=True, eq=False)
class Score:
    """One number for one network, in percent, and which pictures it got right."""

    accuracy: float
    correct: np.ndarray


def compare(options: LearningOptions) -> None:
    if not options.runs:
        raise UserError("--runs needs at least one folder of a finished run")
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    train, val = open_train_and_val(options.data_path)
    rows: list[dict[str, Any]] = []
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for folder in tqdm(options.runs, desc="runs", unit="run"):
        before, after, trained_with = _networks(Path(folder))
        size = options.eval_size or trained_with.eval_size or trained_with.global_crops_size
        scores = [_scores(backbone, train, val, size) for backbone in (before, after)]
        for name in scores[0]:
            pooled.setdefault(name, []).append((scores[1][name].correct, scores[0][name].correct))
            before_score, after_score = (score[name] for score in scores)
            compared = paired_difference(after_score.correct, before_score.correct)
            rows.append(_row(folder, name, before_score.accuracy, after_score.accuracy, *compared))
        if isinstance(train, DemoPictures) and isinstance(val, DemoPictures):
            rows += [
                {"run": folder, "measure": name, "before": a, "after": b}
                for (name, a), b in zip(
                    _attention(before, train, val, size).items(),
                    _attention(after, train, val, size).values(),
                    strict=True,
                )
            ]
    for name, pairs in pooled.items():
        after_all, before_all = (np.stack(side) for side in zip(*pairs, strict=True))
        compared = paired_difference_over_runs(after_all, before_all)
        rows.append(_row("all", name, 100 * before_all.mean(), 100 * after_all.mean(), *compared))
    _print(rows)
    if options.output:
        text = (
            json.dumps({**provenance(), "machine": describe(torch.device("cpu")), "rows": rows}, indent=1)
            + "\n"
        )
        write_atomically(Path(options.output), lambda temporary: temporary.write_text(text))


def _networks(folder: Path) -> tuple[nn.Module, nn.Module, TrainOptions]:
    """The backbone of the run's random start and its trained teacher's."""
    content, _ = checkpoint.load_latest(folder)
    if content is None:
        raise UserError(f"no checkpoint in {folder}")
    known = {field.name for field in fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in content["args"].items() if name in known})
    start, end = (create_distillation(options, torch.device("cpu"), "fp32") for _ in range(2))
    checkpoint.unpack(content, end.student, end.teacher, end.optimizer, end.center.center)
    return start.teacher.backbone, end.teacher.backbone, options


def _scores(backbone: nn.Module, train: Pictures, val: Pictures, size: int) -> dict[str, Score]:
    extractor = Extractor(backbone, Preparation(size=size))
    features = [extractor.extract(part, progress=None) for part in (train, val)]
    train_labels, val_labels = (part.labels for part in features)
    assert train_labels is not None and val_labels is not None
    val_labels = class_numbers(val.classes, train.classes)[val_labels]
    scores = {}
    for token, kind in {"class token": CLASS_TOKEN, "patch mean": PATCH_MEAN}.items():
        x, y = (part[kind] for part in features)
        knn = knn_accuracy(x, train_labels, y, val_labels, ks=(_NEIGHBOURS,))[_NEIGHBOURS]
        logistic = logistic_accuracy(x, train_labels, y, val_labels)
        scores[f"{_NEIGHBOURS}-NN, {token}"] = Score(knn.top1, knn.correct)
        scores[f"logistic, {token}"] = Score(logistic.top1, logistic.correct)
    return scores


def _attention(backbone: nn.Module, train: DemoPictures, val: DemoPictures, size: int) -> dict[str, float]:
    """Mass on the object over its area: 1 is chance. The head is chosen on training pictures."""
    chosen = int(_head_scores(backbone, train, size).mean(axis=0).argmax())
    on_val = _head_scores(backbone, val, size)
    return {
        "attention on object, best head": float(on_val[:, chosen].mean()),
        "attention on object, mean of heads": float(on_val.mean()),
        "attention on object, centred disc": float(np.mean([_disc(val.mask(i)) for i in _scored(val)])),
    }


def _scored(pictures: Pictures) -> list[int]:
    return np.linspace(0, len(pictures) - 1, min(_SCORED_PICTURES, len(pictures))).astype(int).tolist()


def _head_scores(backbone: nn.Module, pictures: DemoPictures, size: int) -> np.ndarray:
    """(pictures, heads)"""
    large = (_ATTENTION_RESOLUTION * size, _ATTENTION_RESOLUTION * size)
    return np.stack(
        [
            object_score(
                attention_maps(backbone, resize(pictures.picture(index), large)[None])[0],
                pictures.mask(index),
                patch_side(backbone),
                input_size=large,
            )
            for index in _scored(pictures)
        ]
    )


def _disc(mask: np.ndarray) -> float:
    """The same measure for a uniform disc in the middle that is as large as the object."""
    rows, cols = np.indices(mask.shape) - (np.array(mask.shape)[:, None, None] - 1) / 2
    nearest = np.argsort((rows**2 + cols**2).ravel())[: mask.sum()]
    return float(mask.ravel()[nearest].mean() / mask.mean())


def _row(
    run: str, name: str, before: float, after: float, difference: float, p_value: float
) -> dict[str, Any]:
    return {
        "run": run,
        "measure": name,
        "before": before,
        "after": after,
        "difference": difference,
        "p": p_value,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["run"]) for row in rows)
    print(f"{'run':{width}}  {'measure':36} {'before':>7} {'after':>7} {'change':>7}  p")
    for row in rows:
        change = f"{row['difference']:+7.1f}  {row['p']:.1e}" if "p" in row else ""
        print(f"{row['run']:{width}}  {row['measure']:36} {row['before']:7.2f} {row['after']:7.2f} {change}")


if __name__ == "__main__":
    command(LearningOptions, compare, prog="benchmarks/learning.py", description=__doc__ or "")
