"""The feature files of DINO's eval_knn.py: L2-normalised features and int64 labels, one tensor a file."""

import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dino.runtime.checkpoint import save_atomically
from dino.runtime.files import make_writable
from dino.runtime.options import UserError

_NAMES = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def dump_features(
    folder: str, train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> None:
    """Write the four files, each whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    content = (
        F.normalize(torch.from_numpy(train), dim=1),
        torch.from_numpy(train_labels),
        F.normalize(torch.from_numpy(test), dim=1),
        torch.from_numpy(test_labels),
    )
    make_writable(Path(folder), "--dump_features")
    for name, tensor in zip(_NAMES, content, strict=True):
        save_atomically(tensor, Path(folder, name))


def load_features(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train features (n, C) and labels (n,), test features and labels, from the four files.

    Raises:
        UserError: a file is missing, damaged, or does not fit the others.
    """
    train, train_labels, test, test_labels = (_load(Path(folder, name)) for name in _NAMES)
    for features, labels in ((train, train_labels), (test, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise UserError(
                f"features and labels in {folder} do not fit: shapes {features.shape} and {labels.shape}"
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
    except FileNotFoundError:
        raise UserError(f"{file} is missing; --load_features needs {', '.join(_NAMES)}") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} cannot be read as a tensor; write it again with --dump_features") from error
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{file} holds a {type(tensor).__name__}, not a tensor")
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
