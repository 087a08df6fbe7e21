"""Frozen features of the labelled pictures that a benchmark is about, by all processes together.

Imports no torch, so that `--help` answers at once.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.evaluation.evaluation_options import FeatureOptions
from dino.evaluation.subject import Subject, create_subject, say

if TYPE_CHECKING:
    from dino.evaluation.extraction import Features
    from dino.runtime.pictures import Pictures


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Features of the readable pictures of both sets.

    Attributes:
        train_labels, val_labels: (n,) int64, places in `classes`.
        one_set: val is train: there is one set only, to be judged leaving one out.
        facts: about subject and pictures, as plain values for `results.json`.
    """

    train: "Features"
    train_labels: np.ndarray
    val: "Features"
    val_labels: np.ndarray
    classes: list[str]
    one_set: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def set_features(
    options: FeatureOptions, subject: Subject, name: str, pictures: "Pictures", kinds: Sequence[str]
) -> tuple["Features", str]:
    """Features of one set, and the fingerprint of its pictures; all processes call it, the main one uses them.

    Raises:
        UserError: see `cached_features`.
    """
    from dino.evaluation.feature_cache import cached_features
    from dino.runtime import distributed
    from dino.runtime.fingerprint import fingerprint

    pictures.as_stored = options.as_stored
    # One process asks the disk for all files, and all go by the same answer.
    (data,) = distributed.gather([fingerprint(pictures)] if distributed.is_main() else [])
    if not options.features_dir and distributed.world_size() == 1:
        features = subject.extractor.extract(pictures, kinds, progress=f"{name} features")
    else:
        with _feature_folder(options.features_dir) as folder:
            features = cached_features(
                folder, name, subject.extractor, pictures, kinds, origin=subject.origin, data=data, say=say
            )
            if not options.features_dir and distributed.is_main():
                in_memory = {kind: np.array(rows) for kind, rows in features.rows.items()}
                features = replace(features, rows=in_memory)
    for broken in features.broken:
        say(f"left out: {broken}")
    return features, data.content


@contextmanager
def _feature_folder(features_dir: str) -> Iterator[Path]:
    """The folder that all processes write into; one that nobody named is gone afterwards."""
    from dino.runtime import distributed

    if features_dir:
        yield Path(features_dir)
        return
    (folder,) = distributed.gather([tempfile.mkdtemp(prefix="features-")] if distributed.is_main() else [])
    try:
        yield Path(folder)
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def labelled_features(options: FeatureOptions, *, one_set_will_do: bool = False) -> LabelledFeatures | None:
    """Features of the train and val pictures; None in all but the main process.

    Args:
        one_set_will_do: pictures without a val part are accepted, and are both.

    Raises:
        UserError: anything wrong with the model's name, the weights, the pictures or the device.
    """
    from dino.runtime import distributed

    device = distributed.pick_device(options.device, options.local_rank)
    with distributed.processes(device, dist_url=options.dist_url):
        with distributed.together():
            subject = create_subject(options, device)
        return extract_both(options, subject, one_set_will_do=one_set_will_do)


def extract_both(
    options: FeatureOptions, subject: Subject, *, one_set_will_do: bool = False
) -> LabelledFeatures | None:
    """The same for a backbone that is there; all processes call it, and the main one gets the features.

    Raises:
        UserError: anything wrong with the pictures, or with the disk.
    """
    from dino.evaluation.extraction import standard_kinds
    from dino.evaluation.labelled_sets import class_numbers, open_one_or_two
    from dino.runtime import distributed

    with distributed.together():
        train_pictures, val_pictures = open_one_or_two(
            options.data_path, one_will_do=one_set_will_do, say=say
        )
    distributed.share_cores(subject.extractor.device, options.num_workers)  # one before may have taken all
    kinds = standard_kinds(subject.extractor.backbone)
    train, train_data = set_features(options, subject, "train", train_pictures, kinds)
    val, val_data = train, train_data
    if val_pictures:
        val, val_data = set_features(options, subject, "val", val_pictures, kinds)
    if not distributed.is_main():
        return None
    distributed.take_all_cores()
    assert train.labels is not None and val.labels is not None
    classes = train_pictures.classes
    numbers = class_numbers((val_pictures or train_pictures).classes, classes)
    say(
        f"{len(train.names)} training and {len(val.names)} val pictures of {len(classes)} classes"
        if val_pictures
        else f"{len(train.names)} pictures of {len(classes)} classes, one set: each is judged by all others"
    )
    facts = {
        **subject.facts,
        "data_path": options.data_path,
        "data_sha256": {"train": train_data, "val": val_data},
        "pictures": {"train": len(train.names), "val": len(val.names)},
        "classes": classes,
        "broken": [*train.broken, *(val.broken if val_pictures else [])],
    }
    return LabelledFeatures(
        train=train,
        train_labels=train.labels,
        val=val,
        val_labels=numbers[val.labels],
        classes=classes,
        one_set=val_pictures is None,
        facts=facts,
    )
