"""What published classifiers and numbers take for granted: ImageNet-1k's classes, in their order, and its size."""

from collections.abc import Sequence

import numpy as np

NUM_CLASSES = 1000
TRAIN_PICTURES = 1_281_167
VAL_PICTURES = 50_000


def imagenet_numbers(classes: Sequence[str]) -> np.ndarray | None:
    """The output of a published classifier for each class folder (`n01440764`, ...), int64.

    None where a name is not one of ImageNet-1k's and there are not 1,000 of them, whose order counts otherwise.
    """
    from timm.data import ImageNetInfo

    place = {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    if all(name in place for name in classes):
        return np.array([place[name] for name in classes], dtype=np.int64)
    return np.arange(NUM_CLASSES) if len(classes) == NUM_CLASSES else None


def what_is_missing(classes: int, val: int, train: int | None = None) -> str | None:
    """In what a set falls short of ImageNet-1k, in words; None where it has its numbers of classes and pictures."""
    wanted = {"classes": (classes, NUM_CLASSES), "val pictures": (val, VAL_PICTURES)}
    if train is not None:
        wanted["training pictures"] = (train, TRAIN_PICTURES)
    short = [f"{have:,} of {want:,} {what}" for what, (have, want) in wanted.items() if have != want]
    return ", ".join(short) or None
