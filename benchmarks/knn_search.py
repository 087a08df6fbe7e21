"""How long does exact k-NN take, and how much memory? The search of `dino.evaluation.knn` on made-up features.

python benchmarks/knn_search.py --output benchmarks/results/knn_search.json

The features are float16 files, as many and as wide as those of ImageNet for XCiT-S: classes are clouds about random
centres in a space where a few directions matter most, as a network's are. A fresh process reads and scores them, so
that making them counts neither as time nor as memory. With --compare true also, in turns, on at most 50,000 x 10,000:
all k by one search against one textbook search for each k.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparison import Comparison, ComparisonOptions, in_turns, isolated, peak_megabytes
from dino.evaluation import search
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.results import provenance
from dino.runtime.distributed import describe
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option

_ROWS_PER_BLOCK = 16384
_COMPARED = (50_000, 10_000)
_TARGET = 5.0
_TEMPERATURE = 0.07
_GB = 1e9


@dataclass(frozen=True)
class SearchOptions(ComparisonOptions):
    train: int = option(1_281_167, "Training features.")
    queries: int = option(50_000, "Test features.")
    width: int = option(384, "Channels of a feature.")
    classes: int = option(1000, "Classes.")
    nb_knn: tuple[int, ...] = option((10, 20, 100, 200), "Numbers of neighbours that vote.")
    compare: bool = option(False, "Also time the textbook's way, one search for each of --nb_knn.")
    turns: int = option(2, "With --compare, measurements of each way, one after the other in turns.")


def measure(options: SearchOptions) -> None:
    sizes = (options.train, options.queries, options.width, options.classes)
    if min(sizes) < 1:
        raise UserError(f"--train, --queries, --width and --classes must be 1 or more, got {sizes}")
    if options.turns < 1:
        raise UserError(f"--turns must be 1 or more, got {options.turns}")
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_both(folder, options)
        report = isolated(_score, folder, options)
        print(json.dumps(report, indent=1))
        if options.compare:
            report["comparison"] = _compared(folder, options)
    if options.output:
        import torch

        machine = describe(torch.device("cpu"))
        text = json.dumps({**provenance(), "machine": machine, **report}, indent=1) + "\n"
        write_atomically(Path(options.output), lambda temporary: temporary.write_text(text))


def comparisons(options: SearchOptions) -> Iterator[Comparison]:
    train, queries = (min(pair) for pair in zip((options.train, options.queries), _COMPARED, strict=True))
    options = replace(options, train=train, queries=queries)
    with tempfile.TemporaryDirectory() as name:
        _make_both(Path(name), options)
        comparison, _ = _compare(Path(name), options)
    yield comparison


def _make_both(folder: Path, options: SearchOptions) -> None:
    for seed, (part, count) in enumerate({"train": options.train, "test": options.queries}.items()):
        _make(folder, part, count, options, seed)


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
    return {
        "train": options.train,
        "queries": options.queries,
        "width": options.width,
        "classes": options.classes,
        "device": options.device,
        "seconds": seconds,
        "peak_resident_gb": peak_megabytes() / 1000,
        "of_that_feature_files_gb": (train.nbytes + test.nbytes) / _GB,
        "searched_again_in_float64": len(in_doubt) / options.queries,
        "top1": {str(k): result.top1 for k, result in results.items()},
    }


def _compared(folder: Path, options: SearchOptions) -> dict[str, Any]:
    """Seconds of both ways in turns, and whether they agree."""
    comparison, agree = _compare(folder, options)
    ks = _compared_ks(options)
    train, queries = (min(pair) for pair in zip((options.train, options.queries), _COMPARED, strict=True))
    print(f"{train} x {queries} for k = {', '.join(map(str, ks))}; same predictions: {agree:.2%}")
    print(comparison.line())
    ways = {"one search": comparison.ours, "textbook": comparison.theirs}
    seconds = {name: [turn / 1000 for turn in turns] for name, turns in ways.items()}
    return {"train": train, "queries": queries, "ks": ks, "seconds": seconds, "same_predictions": agree}


def _compared_ks(options: SearchOptions) -> tuple[int, ...]:
    return tuple(k for k in options.nb_knn if k <= min(options.train, _COMPARED[0]))


def _compare(folder: Path, options: SearchOptions) -> tuple[Comparison, float]:
    """Both ways from the same arrays in memory; and the least share of a k's predictions that are the same."""
    loaded = [_load(folder, part) for part in ("train", "test")]
    (train, train_labels), (test, test_labels) = (
        (features[:most].astype(np.float32), labels[:most])
        for (features, labels), most in zip(loaded, _COMPARED, strict=True)
    )
    ks = _compared_ks(options)
    predicted: dict[str, dict[int, np.ndarray]] = {}

    def theirs() -> None:
        predicted["theirs"] = {
            k: textbook(train, train_labels, test, k, _TEMPERATURE, options.classes, options.device)
            for k in ks
        }

    def ours() -> None:
        results = knn_accuracy(
            *(train, train_labels, test, test_labels),
            ks=ks,
            temperature=_TEMPERATURE,
            num_classes=options.classes,
            device=options.device,
        )
        predicted["ours"] = {k: result.predictions for k, result in results.items()}

    comparison = Comparison(
        f"k-NN, k = {', '.join(map(str, ks))}, {len(train)} x {len(test)} x {options.width}",
        "ms",
        *in_turns(theirs, ours, turns=options.turns, device=options.device),
        peer="a search with torch.topk for each k",
        target=_TARGET,
    )
    return comparison, min(float((predicted["ours"][k] == predicted["theirs"][k]).mean()) for k in ks)


def textbook(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    k: int,
    temperature: float,
    classes: int,
    device: str = "cpu",
) -> np.ndarray:
    """Predictions (n,) for one k as in DINO's eval_knn.py: cosines of a hundredth of the queries, topk, votes."""
    import torch
    from torch.nn import functional as F

    labels = torch.from_numpy(train_labels).to(device)
    train_NC, test_NC = (F.normalize(torch.from_numpy(part).to(device), dim=1) for part in (train, test))
    predictions = []
    for query_QC in test_NC.split(max(1, len(test_NC) // 100)):
        cosine_Qk, neighbour_Qk = (query_QC @ train_NC.T).topk(k)
        votes_QL = torch.zeros(len(query_QC), classes, device=device)
        votes_QL.scatter_add_(1, labels[neighbour_Qk], (cosine_Qk / temperature).exp())
        predictions.append(votes_QL.argmax(dim=1))
    return torch.cat(predictions).cpu().numpy()


if __name__ == "__main__":
    command(SearchOptions, measure, prog="benchmarks/knn_search.py", description=__doc__ or "")
