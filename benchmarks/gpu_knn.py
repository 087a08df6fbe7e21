"""k-NN on a GPU: all k by one search of ours, against one search for each k as DINO's eval_knn.py does it there.

A part of `benchmarks/gpu.py`, which runs it.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.comparison import Comparison
from benchmarks.knn_search import SearchOptions, _load, _make, _score

_CHUNKS = 100
_TEMPERATURE = 0.07


def knn_comparison(train: int, queries: int, *, device: str) -> Comparison:
    """Seconds from the features' files to the accuracies."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = SearchOptions(train=train, queries=queries, device=device)
        for seed, (part, count) in enumerate({"train": train, "test": queries}.items()):
            _make(folder, part, count, options, seed)
        ks = tuple(k for k in options.nb_knn if k <= train)
        start = time.perf_counter()
        known = _textbook(folder, ks, options.classes, device)
        theirs = time.perf_counter() - start
        found = _score(folder, options)
    apart = max(abs(found["top1"][str(k)] - known[k]) for k in ks)
    return Comparison(
        f"k-NN, {train} x {queries}, k = {', '.join(map(str, ks))}",
        "s",
        [theirs],
        [found["seconds"]],
        peer="one search with topk for each k",
        note=f"ours has at most {found['peak_resident_gb']:.1f} GB of the host; "
        f"accuracies differ by {apart:.2f} points",
    )


def _textbook(folder: Path, ks: Sequence[int], classes: int, device: str) -> dict[int, float]:
    """Top-1 accuracy in percent for each k, from one search each."""
    (train_NC, train_labels), (test_NC, test_labels) = (
        (
            F.normalize(torch.from_numpy(features[:]).to(device).float(), dim=1),
            torch.from_numpy(labels).to(device),
        )
        for features, labels in (_load(folder, "train"), _load(folder, "test"))
    )
    return {k: _accuracy(train_NC, train_labels, test_NC, test_labels, k, classes) for k in ks}


def _accuracy(
    train_NC: Tensor, train_labels: Tensor, test_NC: Tensor, test_labels: Tensor, k: int, classes: int
) -> float:
    """Cosines of a hundredth of the queries with all features, topk, votes."""
    right = torch.zeros((), device=train_NC.device)
    size = max(1, len(test_NC) // _CHUNKS)
    for query_QC, label_Q in zip(test_NC.split(size), test_labels.split(size), strict=True):
        cosine_Qk, neighbour_Qk = (query_QC @ train_NC.T).topk(k)
        votes_QL = torch.zeros(len(query_QC), classes, device=train_NC.device)
        votes_QL.scatter_add_(1, train_labels[neighbour_Qk], (cosine_Qk / _TEMPERATURE).exp())
        right += (votes_QL.argmax(dim=1) == label_Q).sum()
    return 100 * right.item() / len(test_NC)
