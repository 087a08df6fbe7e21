"""Exact nearest neighbours by cosine, the same on every backend: float32 proposes, float64 decides.

N = training set, Q = queries of a block, C = channels, D = C + 1, k = neighbours, P = proposals, k and some more

The score of two features a and b of length 1 is their cosine less 1: -|a - b|^2 / 2, of which float64 keeps all digits
even where a network's features are nearly equal. It is computed in the same way wherever the pair stands, so that
copies have equal scores; of equal scores the lower row of the training set comes first. faiss or torch only name
candidates, in float32. Where its rounding could have lost a neighbour, the query is searched again in float64.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_ROWS_PER_BLOCK = 16384  # of the training set
_QUERIES_PER_SEARCH = 1024  # both backends multiply large matrices faster
_QUERIES_PER_ANSWER = 512
_PAIRS_PER_BLOCK = 1024  # float64 differences of so many fit a processor's cache

# So few rows more leave next to no query in doubt, unless features are nearly copies of each other.
_SPARE_PROPOSALS = 32
# Bounds the float64 scores of a second search, which takes all of the training set at once.
_SCORES_AT_ONCE = 2**25

Answer = tuple[np.ndarray, np.ndarray, np.ndarray]


def neighbours(
    train: np.ndarray,
    test: np.ndarray,
    k: int,
    *,
    exclude_self: bool = False,
    device: "torch.device | str | None" = None,
) -> Iterator[Answer]:
    """The k nearest of the training set for every query, a block of queries at a time.

    Args:
        train, test: finite features (n, C) of any scale, also `np.memmap`. A feature of zeros has cosine 0 with all.
        k: at most the training set, less one for `exclude_self`.
        exclude_self: test is the training set, in its order, and no row is its own neighbour.
        device: CUDA = torch searches there; any other, or None = faiss searches on the CPU.

    Yields:
        Rows of the test set (Q,); cosines less 1 (Q, k), float64, from the nearest to the farthest; rows of the
        training set (Q, k). Every row of the test set comes once, those that float32 left in doubt at the end.
    """
    search = Search(train, test, k + exclude_self, device)
    for rows, score_Qk, neighbour_Qk in search.answers():
        if exclude_self:
            other = neighbour_Qk != rows[:, None]
            other[other.all(axis=1), -1] = False  # itself lost the tie with its copies: one of them goes
            score_Qk, neighbour_Qk = (part[other].reshape(-1, k) for part in (score_Qk, neighbour_Qk))
        yield rows, score_Qk, neighbour_Qk


class Search:
    """The search of one test set in one training set."""

    def __init__(
        self, train: np.ndarray, test: np.ndarray, k: int, device: "torch.device | str | None"
    ) -> None:
        self._train, self._test, self._k = _Features(train), _Features(test), k
        self._space = _Space(self._train)
        on_cuda = str(device).startswith("cuda")
        rows_ND = self._space.train_ND
        self._backend = TorchBackend(rows_ND, device) if on_cuda else FaissBackend(rows_ND)

    def answers(self) -> Iterator[Answer]:
        """As `neighbours` yields them, a picture being its own nearest."""
        from dino.runtime.distributed import usable_cores

        # numpy lets others compute meanwhile: the cores share the queries.
        with ThreadPoolExecutor(usable_cores()) as threads:
            yield from self._answers(threads)

    def _answers(self, threads: ThreadPoolExecutor) -> Iterator[Answer]:
        in_doubt: list[int] = []
        for block in _blocks(len(self._test), _QUERIES_PER_SEARCH):
            proposed_QP, certain_Q = self._propose(block)
            rows_Q = np.arange(block.start, block.stop)
            in_doubt += rows_Q[~certain_Q].tolist()
            rows_Q, proposed_QP = rows_Q[certain_Q], proposed_QP[certain_Q]
            for part in _blocks(len(rows_Q), _QUERIES_PER_ANSWER):
                query_QC = self._test.unit(rows_Q[part])
                decided = threads.map(self._decide, query_QC, proposed_QP[part])
                score_Qk, neighbour_Qk = (np.stack(side) for side in zip(*decided, strict=True))
                yield rows_Q[part], score_Qk, neighbour_Qk
        yield from self._search_again(in_doubt)

    def _propose(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the training set (Q, P), and whether the k nearest are certainly among them (Q,)."""
        query_QD = self._space.queries(self._test.unit(rows))
        count = min(self._k + _SPARE_PROPOSALS, len(self._train))
        score_QP, proposed_QP = self._backend.nearest(query_QD.astype(np.float32), count)
        # None of the others is above the last, and k of these are above it by more than two scores can be wrong.
        gap_Q = score_QP[:, self._k - 1].astype(np.float64) - score_QP[:, -1]
        certain_Q = gap_Q > 2 * self._space.largest_error(query_QD, np.float32)
        return proposed_QP, certain_Q | (count == len(self._train))

    def _search_again(self, rows: list[int]) -> Iterator[Answer]:
        """In all of the training set by float64. Equal queries, as a collapsed network's are, take one search."""
        equal: dict[bytes, list[int]] = {}
        for row in rows:
            equal.setdefault(self._test.bytes(row), []).append(row)
        groups = list(equal.values())
        for part in _blocks(len(groups), max(1, _SCORES_AT_ONCE // len(self._train))):
            query_QC = self._test.unit(np.array([group[0] for group in groups[part]]))
            near = self._near(query_QC)
            for group, query_C, candidates in zip(groups[part], query_QC, near, strict=True):
                decided = self._decide(query_C, candidates)
                for members in _blocks(len(group), _QUERIES_PER_ANSWER):
                    rows_Q = np.array(group[members])
                    score_Qk, neighbour_Qk = (np.tile(side, (len(rows_Q), 1)) for side in decided)
                    yield rows_Q, score_Qk, neighbour_Qk

    def _near(self, query_QC: np.ndarray) -> Iterator[np.ndarray]:
        """For each query the rows that float64's rounding leaves a chance to be among the k nearest."""
        query_QD = self._space.queries(query_QC)
        score_QN = np.empty((len(query_QD), len(self._train)))
        for rows in _blocks(len(self._train), _ROWS_PER_BLOCK):
            score_QN[:, rows] = query_QD @ self._space.training(rows).T
        error_Q = self._space.largest_error(query_QD, np.float64)
        for score_N, error in zip(score_QN, error_Q, strict=True):
            yield np.flatnonzero(score_N >= np.partition(score_N, -self._k)[-self._k] - 2 * error)

    def _decide(self, query_C: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores (k,) and rows (k,) of the k nearest of the candidates."""
        rows = np.sort(candidates)
        score = np.full(len(rows), -1.0)
        for part in _blocks(len(rows) if query_C.any() else 0, _PAIRS_PER_BLOCK):
            difference = self._train.unit(rows[part])
            difference -= query_C
            score[part] = np.einsum("pc,pc->p", difference, difference) / -2
        score[self._train.lengths[rows] == 0] = -1
        nearest = np.argsort(-score, kind="stable")[: self._k]
        return score[nearest], rows[nearest]


class _Features:
    """Features (n, C) at length 1 in float64, some rows at a time; zeros stay zeros."""

    def __init__(self, features: np.ndarray) -> None:
        self._features = np.asarray(features)  # the same memory, without the slow indexing of a np.memmap
        self.lengths = np.empty(len(features))
        for rows in _blocks(len(features), _ROWS_PER_BLOCK):
            block = self._features[rows].astype(np.float64, order="C")
            self.lengths[rows] = np.sqrt(np.einsum("rc,rc->r", block, block))

    def __len__(self) -> int:
        return len(self.lengths)

    def unit(self, rows: "slice | np.ndarray") -> np.ndarray:
        unit = self._features[rows].astype(np.float64, order="C")
        unit /= np.where(self.lengths[rows] > 0, self.lengths[rows], 1)[:, None]
        return unit

    def bytes(self, row: int) -> bytes:
        return self._features[row].tobytes()


class _Space:
    """Where a matrix product gives the scores, up to a constant for each query.

    Features of an untrained or collapsed network have cosines within 1e-4 of 1, where float32 has few digits left.
    So the mean m of the training features is taken off: -|a - b|^2 / 2 is
    <a - m, b - m> - |b - m|^2 / 2 - |a - m|^2 / 2, a sum of small numbers. The middle term, about its own mean, is one
    more channel, with a factor that makes it as large as the others; the last one is the query's constant.
    """

    def __init__(self, train: _Features) -> None:
        self._train = train
        blocks = list(_blocks(len(train), _ROWS_PER_BLOCK))
        self._mean_C = sum(train.unit(rows).sum(axis=0) for rows in blocks) / len(train)
        self.train_ND = np.empty((len(train), len(self._mean_C) + 1), dtype=np.float32)
        half_N = np.empty(len(train))
        for rows in blocks:
            centred = train.unit(rows) - self._mean_C
            self.train_ND[rows, :-1] = centred
            half_N[rows] = np.einsum("rc,rc->r", centred, centred) / 2
        half_N[train.lengths == 0] += 0.5  # their score is -1, which the distance to the origin is not
        self._factor = np.sqrt(2 * half_N.mean()) or 1.0
        self._channel_N = (half_N.mean() - half_N) / self._factor
        self.train_ND[:, -1] = self._channel_N
        self._longest = float(np.sqrt((2 * half_N + self._channel_N**2).max()))

    def training(self, rows: slice) -> np.ndarray:
        """Some rows of `train_ND` in float64."""
        return np.column_stack([self._train.unit(rows) - self._mean_C, self._channel_N[rows]])

    def queries(self, unit_QC: np.ndarray) -> np.ndarray:
        """(Q, D) in float64. All scores of a query of zeros are equal."""
        query_QD = np.column_stack([unit_QC - self._mean_C, np.full(len(unit_QC), self._factor)])
        return query_QD * unit_QC.any(axis=1, keepdims=True)

    def largest_error(self, query_QD: np.ndarray, dtype: type[np.floating[Any]]) -> np.ndarray:
        """What rounding can change in a product with a row of the training set (Q,).

        The roundings of D terms add up as a random walk; the factor is some standard deviations of it.
        """
        length_Q = np.linalg.norm(query_QD, axis=1)
        return 8 * np.finfo(dtype).eps * np.sqrt(query_QD.shape[1]) * length_Q * self._longest


class FaissBackend:
    """Candidates by faiss, on the CPU."""

    def __init__(self, train_ND: np.ndarray) -> None:
        self._train_ND = train_ND

    def nearest(self, query_QD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The largest inner products, falling, and their rows: both (Q, count)."""
        import faiss

        faiss.cvar.distance_compute_blas_database_bs = (
            _ROWS_PER_BLOCK  # its own is too small for fast products
        )
        # Not an index: it would hold the features once more, and at times thrice while it grows.
        return faiss.knn(query_QD, self._train_ND, count, metric=faiss.METRIC_INNER_PRODUCT)


class TorchBackend:
    """Candidates by torch on any device, meant for CUDA."""

    def __init__(self, train_ND: np.ndarray, device: "torch.device | str | None") -> None:
        import torch

        self._train_ND = torch.from_numpy(train_ND).to(device)

    def nearest(self, query_QD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The largest inner products, falling, and their rows: both (Q, count)."""
        import torch

        device = self._train_ND.device
        query = torch.from_numpy(query_QD).to(device)
        best = torch.empty(len(query), 0, device=device)
        best_rows = torch.empty(len(query), 0, dtype=torch.long, device=device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # tf32 and bfloat16 would leave every query in doubt
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                for rows in _blocks(len(self._train_ND), _ROWS_PER_BLOCK):
                    score = query @ self._train_ND[rows].T
                    score, found = score.topk(min(count, score.shape[1]))
                    best, best_rows = (
                        torch.cat([best, score], 1),
                        torch.cat([best_rows, found + rows.start], 1),
                    )
                    best, order = best.topk(min(count, best.shape[1]))
                    best_rows = best_rows.gather(1, order)
        finally:
            torch.set_float32_matmul_precision(precision)
        return best.cpu().numpy(), best_rows.cpu().numpy()


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
