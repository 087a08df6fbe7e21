"""Weighted k-NN on frozen features (DINO, section 4.1; the vote of Wu et al., 2018).

python -m dino.evaluation.knn --pretrained_weights checkpoint.pth --data_path imagenet/

n = pictures, k = neighbours, Q = queries of a block, L = classes
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dino.evaluation.benchmark import FeatureOptions, labelled_features
from dino.evaluation.scoring import balanced_accuracy, check_features
from dino.runtime.files import make_writable
from dino.runtime.options import UserError, command, option

# Bound the memory beside the index: votes (queries, classes), neighbours (queries, k), float64 features.
_QUERIES_PER_BLOCK = 512
_ROWS_PER_BLOCK = 16384

# torch.nn.functional.normalize's, so that a zero feature stays zero.
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, eq=False)
class KnnResult:
    """Accuracies in percent, and what they are made of.

    Attributes:
        top1, top5: share of pictures whose class has the most votes, is among the five with most votes (among
            the first k for k < 5, as DINO counts).
        balanced: mean over the test set's classes of each class's top-1.
        neighbours: how many voted: k, or the training set where k is larger.
        predictions: (n,) int64, the class with the most votes; of equal ones the first.
        correct: (n,) bool.
    """

    top1: float
    top5: float
    balanced: float
    neighbours: int
    predictions: np.ndarray
    correct: np.ndarray


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    num_classes: int | None = None,
    exclude_self: bool = False,
    progress: str | None = None,
) -> dict[int, KnnResult]:
    """Each of the k nearest by cosine votes for its class with the weight exp(cosine / temperature).

    One exact search for the largest k serves all. A k above the training set means all of it: see
    `KnnResult.neighbours`.

    Args:
        train, test: features (n, C), of any scale.
        train_labels, test_labels: (n,) in [0, num_classes).
        num_classes: None = one more than the largest label.
        exclude_self: leave-one-out: test is the training set, in its order, and no picture votes for itself.
        progress: title of the progress bar, None = no bar.

    Raises:
        UserError: no pictures, widths that differ, features that are not finite, k < 1 or temperature <= 0.
    """
    check_features(train, test)
    if not ks or min(ks) < 1:
        raise UserError(f"k must be 1 or more, got {', '.join(map(str, ks)) or 'none'}")
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}")
    if num_classes is None:
        num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    available = len(train) - exclude_self
    if exclude_self and (len(train) != len(test) or not available):
        raise UserError(
            f"leave-one-out needs one set of 2 pictures or more, got {len(train)} and {len(test)}"
        )
    used = {k: min(k, available) for k in ks}
    steps = sorted(set(used.values()))
    predictions = {k: np.empty(len(test), dtype=np.int64) for k in steps}
    ranks = {k: np.empty(len(test), dtype=np.int64) for k in steps}
    with tqdm(
        total=len(test), desc=progress, unit="img", disable=progress is None, dynamic_ncols=True
    ) as bar:
        for rows, cosine_Qk, neighbour_Qk in _neighbours(train, test, steps[-1], exclude_self):
            votes = _votes(cosine_Qk, train_labels[neighbour_Qk], steps, temperature, num_classes)
            for k, votes_QL in votes:
                predictions[k][rows] = votes_QL.argmax(axis=1)
                ranks[k][rows] = _ranks(votes_QL, test_labels[rows])
            bar.update(len(cosine_Qk))
    return {k: _result(predictions[used[k]], ranks[used[k]], test_labels, used[k]) for k in ks}


def _unit(features: np.ndarray) -> np.ndarray:
    """Float64, so that nothing is lost before `_Search` takes the mean off."""
    features = features.astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), _SMALLEST_NORM)


class _Search:
    """Exact search by cosine, up to a constant for each query, which neither order nor vote depends on.

    Features of an untrained or collapsed network have cosines within 1e-4 of 1, where float32 has few digits left.
    So the search is for <a - m, b - m> + <m, b> - <m, m>, with m the mean of the training features: that is
    <a, b> - <a, m>, a sum of small numbers. The last two terms are one more channel.
    """

    def __init__(self, train: np.ndarray) -> None:
        import faiss

        blocks = [slice(start, start + _ROWS_PER_BLOCK) for start in range(0, len(train), _ROWS_PER_BLOCK)]
        self._mean = sum(_unit(train[rows]).sum(axis=0) for rows in blocks) / len(train)
        self._index = faiss.IndexFlatIP(train.shape[1] + 1)
        for rows in blocks:
            centred = _unit(train[rows]) - self._mean
            self._index.add(np.column_stack([centred, centred @ self._mean]).astype(np.float32))

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines less each query's constant (Q, k) and rows of the training set (Q, k)."""
        centred = _unit(queries) - self._mean
        return self._index.search(np.column_stack([centred, np.ones(len(centred))]).astype(np.float32), k)


def _neighbours(
    train: np.ndarray, test: np.ndarray, k: int, exclude_self: bool
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Rows of the test set, `_Search.nearest` of them from the nearest to the farthest; ties by row."""
    search = _Search(train)
    for start in range(0, len(test), _QUERIES_PER_BLOCK):
        rows = slice(start, min(start + _QUERIES_PER_BLOCK, len(test)))
        cosine_Qk, neighbour_Qk = search.nearest(test[rows], k + exclude_self)
        if exclude_self:
            other = neighbour_Qk != np.arange(rows.start, rows.stop)[:, None]
            other[other.all(axis=1), -1] = False  # itself lost the tie with its duplicates: one of them goes
            cosine_Qk = cosine_Qk[other].reshape(-1, k)
            neighbour_Qk = neighbour_Qk[other].reshape(-1, k)
        order = np.lexsort((neighbour_Qk, -cosine_Qk), axis=-1)
        yield rows, np.take_along_axis(cosine_Qk, order, 1), np.take_along_axis(neighbour_Qk, order, 1)


def _votes(
    cosine_Qk: np.ndarray, labels_Qk: np.ndarray, steps: Sequence[int], temperature: float, num_classes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """For each k of `steps` (rising), k and the votes (Q, L); the array is reused for the next k."""
    # The nearest weighs 1: a common factor changes no order, and exp cannot overflow at a low temperature.
    weights_Qk = np.exp((cosine_Qk - cosine_Qk[:, :1]).astype(np.float64) / temperature)
    votes_QL = np.zeros((len(cosine_Qk), num_classes))
    queries = np.arange(len(cosine_Qk))[:, None]
    for previous, k in zip([0, *steps], steps, strict=False):
        np.add.at(votes_QL, (queries, labels_Qk[:, previous:k]), weights_Qk[:, previous:k])
        yield k, votes_QL


def _ranks(votes_QL: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one (Q,); of classes with equal votes the lower comes first."""
    own = votes_QL[np.arange(len(labels)), labels][:, None]
    lower = np.arange(votes_QL.shape[1]) < labels[:, None]
    return np.count_nonzero((votes_QL > own) | ((votes_QL == own) & lower), axis=1)


def _result(predictions: np.ndarray, ranks: np.ndarray, labels: np.ndarray, neighbours: int) -> KnnResult:
    correct = ranks == 0
    return KnnResult(
        top1=100 * float(correct.mean()),
        top5=100 * float((ranks < min(5, neighbours)).mean()),
        balanced=balanced_accuracy(correct, labels),
        neighbours=neighbours,
        predictions=predictions,
        correct=correct,
    )


@dataclass(frozen=True)
class KnnOptions(FeatureOptions):
    nb_knn: tuple[int, ...] = option(
        (10, 20, 100, 200), "Numbers of neighbours that vote, one result for each."
    )
    temperature: float = option(0.07, "A neighbour votes with the weight exp(cosine / temperature).")
    use_cuda: bool = option(True, "false = everything on the CPU, whatever --device says.")
    dump_features: str = option(
        "", "Folder to write the features to, as DINO's eval_knn.py does. Empty = off."
    )
    load_features: str = option("", "Folder to read such features from, instead of pictures. Empty = off.")
    dist_url: str = option("env://", "Accepted for old command lines; one process does all the work.")
    local_rank: int = option(0, "Accepted for old command lines; one process does all the work.")


def run(options: KnnOptions) -> None:
    train, train_labels, test, test_labels = _features(options)
    results = knn_accuracy(
        train,
        train_labels,
        test,
        test_labels,
        ks=options.nb_knn,
        temperature=options.temperature,
        progress="k-NN",
    )
    clamped = [k for k, result in results.items() if result.neighbours < k]
    if clamped:
        listed = " and ".join(map(str, clamped))
        print(f"--nb_knn {listed}: there are only {len(train)} training pictures, so all of them vote")
    for k, result in results.items():
        print(
            f"{k}-NN classifier result: Top1: {result.top1:.3f}, Top5: {result.top5:.3f}, "
            f"Balanced: {result.balanced:.3f}"
        )


def _features(options: KnnOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    from dino.evaluation.feature_files import dump_features, load_features

    if options.load_features:
        return load_features(options.load_features)
    if options.dump_features:
        make_writable(Path(options.dump_features), "--dump_features")
    if not options.use_cuda:
        options = dataclasses.replace(options, device="cpu")
    sets = labelled_features(options)
    features = (sets.train.class_token, sets.train_labels, sets.val.class_token, sets.val_labels)
    if options.dump_features:
        dump_features(options.dump_features, *features)
    return features


def main() -> None:
    command(KnnOptions, run, prog="dino-knn", description="k-NN accuracy of frozen features.")


if __name__ == "__main__":
    main()
