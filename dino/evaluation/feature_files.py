"""Features as files for others: those of DINO's eval_knn.py, and arrays and tables."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from dino.evaluation.extraction import Features
from dino.evaluation.kinds import KINDS
from dino.runtime.checkpoint import save_atomically
from dino.runtime.files import make_writable, write_atomically, writing
from dino.runtime.options import UserError

_NAMES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")

_ROWS_PER_GROUP = 1024


def dump_features(
    folder: str, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> None:
    """Write DINO's four files, L2-normalised features and int64 labels, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    content = (
        F.normalize(torch.from_numpy(train.astype(np.float32)), dim=1),
        torch.from_numpy(train_labels),
        F.normalize(torch.from_numpy(test.astype(np.float32)), dim=1),
        torch.from_numpy(test_labels),
    )
    make_writable(Path(folder), "--dump_features")
    for name, tensor in zip(_NAMES, content, strict=True):
        save_atomically(tensor, Path(folder, name))


def load_features(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train features (n, C) and labels (n,), test features and labels, from the four files.

    Raises:
        UserError: a file is missing, damaged, empty, or does not fit the others.
    """
    train, train_labels, test, test_labels = (_load(Path(folder, name)) for name in _NAMES)
    for features, labels in ((train, train_labels), (test, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise UserError(
                f"features and labels in {folder} do not fit: shapes {features.shape} and {labels.shape}"
            )
        if not features.size:
            raise UserError(f"the features in {folder} are empty: shape {features.shape}")
        if not np.issubdtype(features.dtype, np.floating) or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(
                f"features must be floats and labels integers; {folder} holds {features.dtype} and {labels.dtype}"
            )
    return (
        train.astype(np.float32),
        train_labels.astype(np.int64),
        test.astype(np.float32),
        test_labels.astype(np.int64),
    )


def _load(file: Path) -> np.ndarray:
    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(tensor, torch.Tensor):
            tensor = tensor.detach()
            return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    except FileNotFoundError:
        raise UserError(f"{file} is missing; --load_features needs {', '.join(_NAMES)}") from None
    except Exception as error:  # damaged files fail in every way there is
        raise UserError(f"{file} cannot be read as a tensor; write it again with --dump_features") from error
    raise UserError(f"{file} holds a {type(tensor).__name__}, not a tensor")


def check_format(name: str) -> None:
    """Find out before long work that the format can be written.

    Raises:
        UserError: the package that writes it is not installed.
    """
    if name == "parquet":
        _pyarrow()


def write_features(
    features: Features, classes: Sequence[str], facts: Mapping[str, Any], stem: Path, format: str
) -> Path:
    """Write features with names and labels, and the facts about them beside as JSON; returns the path.

    Args:
        facts: plain values, such as weights and preprocessing.
        stem: path without suffix.
        format: `npy`, a folder of arrays; `npz`, one file of them; or `parquet`, a table.

    Raises:
        UserError: the disk is full or the like, or pyarrow is missing for parquet.
    """
    target = stem if format == "npy" else stem.with_name(f"{stem.name}.{format}")
    arrays: dict[str, Any] = {
        **features.rows,
        "names": np.array(features.names),
        "classes": np.array(classes, dtype=str),
    }
    if features.labels is not None:
        arrays["labels"] = features.labels
    if format == "npy":
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
            for name in {*KINDS, "labels"} - arrays.keys():  # of other pictures or weights, from before
                (target / f"{name}.npy").unlink(missing_ok=True)
        for name, array in arrays.items():
            _write_array(target / f"{name}.npy", array)
    elif format == "npz":
        # To an open file: numpy adds the suffix to a name that lacks it.
        write_atomically(target, lambda temporary: _with_file(temporary, partial(np.savez, **arrays)))
    else:
        write_atomically(target, lambda temporary: _write_table(temporary, features, classes))
    text = json.dumps(dict(facts), indent=1) + "\n"
    write_atomically(stem.with_name(f"{stem.name}.json"), lambda temporary: temporary.write_text(text))
    return target


def _write_array(path: Path, array: np.ndarray) -> None:
    write_atomically(path, lambda temporary: _with_file(temporary, lambda file: np.save(file, array)))


def _with_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        write(file)


def _write_table(path: Path, features: Features, classes: Sequence[str]) -> None:
    """One row per picture; features as lists of float32, patch tokens one after the other."""
    pyarrow, parquet = _pyarrow()
    kinds = {kind: int(np.prod(rows.shape[1:])) for kind, rows in features.rows.items()}
    fields = [
        ("name", pyarrow.string()),
        *([("label", pyarrow.int64()), ("class", pyarrow.string())] if features.labels is not None else []),
        *((kind, pyarrow.list_(pyarrow.float32(), width)) for kind, width in kinds.items()),
    ]
    schema = pyarrow.schema(fields)
    with parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(features.names), _ROWS_PER_GROUP):
            part = slice(start, start + _ROWS_PER_GROUP)
            columns: list[Any] = [pyarrow.array(features.names[part])]
            if features.labels is not None:
                labels = features.labels[part]
                columns += [pyarrow.array(labels), pyarrow.array([classes[label] for label in labels])]
            for kind, width in kinds.items():
                values = pyarrow.array(features[kind][part].astype(np.float32).ravel())
                columns.append(pyarrow.FixedSizeListArray.from_arrays(values, width))
            writer.write_table(pyarrow.table(columns, schema=schema))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "--format parquet needs pyarrow: pip install pyarrow (or dino-xcit[parquet]), or take npz"
        ) from None
    return pyarrow, pyarrow.parquet
