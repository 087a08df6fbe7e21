"""How long does exact k-NN take, and how much memory? The search of `dino.evaluation.knn` on made-up features.

python benchmarks/knn_search.py --output benchmarks/results/knn_search.json

The features are float16 files, as many and as wide as those of ImageNet for XCiT-S: classes are clouds about random
centres in a space where a few directions matter most, as a network's are. A fresh process reads and scores them, so
that making them counts neither as time nor as memory. With --compare true also, in turns, on at most 50,000 x 10,000:
all k by one search against one textbook search for each k.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino.evaluation import search
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.results import provenance
from dino.runtime.distributed import describe
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option

_ROWS_PER_BLOCK = 16384
_COMPARED = (50_000, 10_000)
_TURNS = 3
_TEMPERATURE = 0.07
_GB = 1e9


@dataclass(frozen=True)
class SearchOptions:
    train: int = option(1_281_167, "Training features.")
    queries: int = option(50_000, "Test features.")
    width: int = option(384, "Channels of a feature.")
    classes: int = option(1000, "Classes.")
    nb_knn: tuple[int, ...] = option((10, 20, 100, 200), "Numbers of neighbours that vote.")
    device: str = option("cpu", "Where to search: cpu or cuda.")
    compare: bool = option(False, "Also time the textbook's way, one search for each of --nb_knn.")
    output: str = option("", "Write the numbers to this JSON file too; empty = no file.")


def measure(options: SearchOptions) -> None:
    sizes = (options.train, options.queries, options.width, options.classes)
    if min(sizes) < 1:
        raise UserError(f"--train, --queries, --width and --classes must be 1 or more, got {sizes}")
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, (part, count) in enumerate({"train": options.train, "test": options.queries}.items()):
            _make(folder, part, count, options, seed)
        # Not forked: a child's peak memory would begin with its parent's.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            report = process.submit(_score, folder, options).result()
        print(json.dumps(report, indent=1))
        if options.compare:
            report["comparison"] = _compare(folder, options)
    if options.output:
        import torch

        machine = describe(torch.device("cpu"))
        text = json.dumps({**provenance(), "machine": machine, **report}, indent=1) + "\n"
        write_atomically(Path(options.output), lambda temporary: temporary.write_text(text))


def _make(folder: Path, part: str, count: int, options: SearchOptions, seed: int) -> None:
    """Features (count, width) float16 and labels (count,), written a block at a time."""
    weight_C = np.arange(1, options.width + 1, dtype=np.float32) ** -0.5
    centre_LC = (
        np.random.default_rng(99).standard_normal((options.classes, options.width), np.float32) * weight_C
    )
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, options.classes, count)
    features = np.lib.format.open_memmap(
        folder / f"{part}.npy", mode="w+", dtype=np.float16, shape=(count, options.width)
    )
    for start in range(0, count, _ROWS_PER_BLOCK):
        rows = slice(start, min(start + _ROWS_PER_BLOCK, count))
        noise = generator.standard_normal((rows.stop - start, options.width), np.float32) * weight_C
        features[rows] = centre_LC[labels[rows]] + 1.5 * noise
    np.save(folder / f"{part}_labels.npy", labels)


def _load(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / f"{part}.npy", mmap_mode="r"), np.load(folder / f"{part}_labels.npy")


def _score(folder: Path, options: SearchOptions) -> dict[str, Any]:
    """In the fresh process: what the whole of `knn_accuracy` takes, the check of the features included."""
    in_doubt = []

    class Counting(search.Search):
        def _search_again(self, rows: list[int]) -> Iterator[search.Answer]:
            in_doubt.extend(rows)
            return super()._search_again(rows)

    search.Search = Counting  # type: ignore[misc]
    (train, train_labels), (test, test_labels) = _load(folder, "train"), _load(folder, "test")
    start = time.perf_counter()
    results = knn_accuracy(
        train,
        train_labels,
        test,
        test_labels,
        ks=options.nb_knn,
        temperature=_TEMPERATURE,
        device=options.device,
        progress="k-NN",
    )
    seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of one of ru_maxrss
    return {
        "train": options.train,
        "queries": options.queries,
        "width": options.width,
        "classes": options.classes,
        "device": options.device,
        "seconds": seconds,
        "peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GB,
        "of_that_feature_files_gb": (train.nbytes + test.nbytes) / _GB,
        "searched_again_in_float64": len(in_doubt) / options.queries,
        "top1": {str(k): result.top1 for k, result in results.items()},
    }


def _compare(folder: Path, options: SearchOptions) -> dict[str, Any]:
    """Seconds of both ways in turns, each from the same arrays in memory, and whether they agree."""
    loaded = [_load(folder, part) for part in ("train", "test")]
    (train, train_labels), (test, test_labels) = (
        (features[:most].astype(np.float32), labels[:most])
        for (features, labels), most in zip(loaded, _COMPARED, strict=True)
    )
    arrays = (train, train_labels, test, test_labels)
    ks = tuple(k for k in options.nb_knn if k <= len(train))
    textbook(*arrays[:2], test[:1], 1, _TEMPERATURE, options.classes)  # loads torch
    seconds: dict[str, list[float]] = {"one search": [], "textbook": []}
    agree = 1.0
    for _ in range(_TURNS):
        start = time.perf_counter()
        results = knn_accuracy(*arrays, ks=ks, temperature=_TEMPERATURE, num_classes=options.classes)
        middle = time.perf_counter()
        known = {k: textbook(*arrays[:3], k, _TEMPERATURE, options.classes) for k in ks}
        seconds["textbook"].append(time.perf_counter() - middle)
        seconds["one search"].append(middle - start)
        agree = min(float((results[k].predictions == known[k]).mean()) for k in ks)
    print(f"{len(train)} x {len(test)} for k = {', '.join(map(str, ks))}; same predictions: {agree:.2%}")
    for name, turns in seconds.items():
        print(f"{name:10}  {'  '.join(f'{turn:.1f} s' for turn in turns)}")
    return {
        "train": len(train),
        "queries": len(test),
        "ks": ks,
        "seconds": seconds,
        "same_predictions": agree,
    }


def textbook(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, k: int, temperature: float, classes: int
) -> np.ndarray:
    """Predictions (n,) for one k as in DINO's eval_knn.py: cosines of a hundredth of the queries, topk, votes."""
    import torch
    from torch.nn import functional as F

    labels = torch.from_numpy(train_labels)
    train_NC, test_NC = (F.normalize(torch.from_numpy(part), dim=1) for part in (train, test))
    predictions = []
    for query_QC in test_NC.split(max(1, len(test_NC) // 100)):
        cosine_Qk, neighbour_Qk = (query_QC @ train_NC.T).topk(k)
        votes_QL = torch.zeros(len(query_QC), classes)
        votes_QL.scatter_add_(1, labels[neighbour_Qk], (cosine_Qk / temperature).exp())
        predictions.append(votes_QL.argmax(dim=1))
    return torch.cat(predictions).numpy()


if __name__ == "__main__":
    command(SearchOptions, measure, prog="benchmarks/knn_search.py", description=__doc__ or "")
