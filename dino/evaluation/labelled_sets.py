"""The two labelled sets of a benchmark: train, which votes or is fitted, and val, which is scored."""

import numpy as np

from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, open_pictures

_NAMED = 5  # classes listed in an error


def open_train_and_val(data_path: str) -> tuple[Pictures, Pictures]:
    """The two splits of what `--data_path` names; `class_numbers` relates their labels.

    Raises:
        UserError: there is one set only, a set has no classes, or val has classes that train lacks.
    """
    train, val = open_pictures(data_path, split="train"), open_pictures(data_path, split="val")
    if are_one_set(train, val):
        raise UserError(
            f"--data_path {data_path} is one set of pictures; two are needed: a folder that holds train/ and val/, "
            "the name of a torchvision set, or demo"
        )
    for half, pictures in (("train", train), ("val", val)):
        if pictures.labels is None:
            raise UserError(f"the {half} pictures of {data_path} have no classes; give each class a folder")
    class_numbers(val.classes, train.classes)
    return train, val


def are_one_set(first: Pictures, second: Pictures) -> bool:
    """Whether two parts of some data are the same pictures: data without parts gives all of it for each."""
    return len(first) == len(second) and first.name(0) == second.name(0)


def class_numbers(names: list[str], known: list[str]) -> np.ndarray:
    """The place in `known` of each of `names`, int64: what turns val's own labels into train's.

    Raises:
        UserError: some are not known; they are named.
    """
    place = {name: number for number, name in enumerate(known)}
    unknown = [name for name in names if name not in place]
    if unknown:
        listed = ", ".join(unknown[:_NAMED]) + (", ..." if len(unknown) > _NAMED else "")
        raise UserError(
            f"val has {len(unknown)} of its {len(names)} classes without any in train: {listed}; "
            "both need the same class folders"
        )
    return np.array([place[name] for name in names], dtype=np.int64)
