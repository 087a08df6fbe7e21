import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from dino.evaluation import search
from dino.evaluation.knn import knn_accuracy
from dino.evaluation.search import TorchBackend, neighbours


def clusters(count, seed, classes=5, width=6):
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = generator.integers(0, classes, count)
    return (centres[labels] + generator.normal(size=(count, width))).astype(np.float32)


def naive(train, test, k, exclude_self=False):
    """Rows of the k nearest by double loop over integers, which do not round; of equal cosines the lower row."""
    scaled = [[[int(Fraction(float(x)) * 2**149) for x in row] for row in part] for part in (train, test)]
    squares = [sum(x * x for x in row) for row in scaled[0]]
    found = []
    for query, a in enumerate(scaled[1]):
        near = []
        for row, b in enumerate(scaled[0]):
            product = sum(x * y for x, y in zip(a, b, strict=True))
            # The cosine times its size, times the query's squared length.
            near.append((Fraction(-product * abs(product), squares[row] or 1), row))
        found.append([row for _, row in sorted(near) if not (exclude_self and row == query)][:k])
    return found


def answers(train, test, k, **settings):
    """`neighbours` in the order of the queries: scores (n, k) and rows (n, k)."""
    blocks = list(neighbours(train, test, k, **settings))
    rows, scores, found = (np.concatenate(side) for side in zip(*blocks, strict=True))
    assert sorted(rows) == list(range(len(test)))
    order = np.argsort(rows)
    return scores[order], found[order]


def use_torch(monkeypatch, device="cpu"):
    monkeypatch.setattr(search, "FaissBackend", lambda rows: TorchBackend(rows, device))


@pytest.fixture(params=["faiss", "torch"])
def backend(request, monkeypatch):
    if request.param == "torch":
        use_torch(monkeypatch)


@pytest.fixture
def searched_again(monkeypatch):
    """Rows of the queries that float32 left in doubt."""
    rows, original = [], search.Search._search_again
    monkeypatch.setattr(
        search.Search, "_search_again", lambda self, them: rows.extend(them) or original(self, them)
    )
    return rows


SPREADS = {
    "far": lambda x: x,
    "near": lambda x: 1 + np.float32(1e-3) * x,
    "nearer": lambda x: 1 + np.float32(1e-6) * x,
    "half": lambda x: x.astype(np.float16),
    "small": lambda x: x * np.float32(1e-20),
    "large": lambda x: x * np.float32(1e20),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("count", [1, 7, 99, 100, 101])
def test_neighbours_are_those_of_arithmetic_without_rounding(count, spread, backend):
    train, test = SPREADS[spread](clusters(90, seed=0)), SPREADS[spread](clusters(count, seed=1))
    scores, found = answers(train, test, 20)
    assert found.tolist() == naive(train, test, 20)
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("spread", SPREADS)
def test_backends_give_the_same_bits(spread, monkeypatch):
    train, test = (SPREADS[spread](clusters(count, seed, width=48)) for seed, count in enumerate((700, 300)))
    scores, found = answers(train, test, 100)
    use_torch(monkeypatch)
    again = answers(train, test, 100)
    np.testing.assert_array_equal(scores, again[0])
    np.testing.assert_array_equal(found, again[1])


def test_score_is_the_cosine_less_1(backend):
    train, test = clusters(50, seed=0), clusters(9, seed=1)
    scores, found = answers(train, test, 50)
    a, b = (part / np.linalg.norm(part.astype(float), axis=1, keepdims=True) for part in (test, train))
    np.testing.assert_allclose(scores + 1, np.take_along_axis(a @ b.T, found, 1), atol=1e-15)


def test_copies_at_the_last_place_come_by_row(backend):
    train = clusters(200, seed=0)
    generator = np.random.default_rng(2)
    train[generator.permutation(200)[:80]] = train[5]  # more than there are proposals
    train[generator.permutation(200)[:8]] = 2 * train[7]
    for exclude_self in (False, True):
        expected = naive(train, train, 200, exclude_self)
        for k in (1, 3, 30, 80, 120):
            _, found = answers(train, train, k, exclude_self=exclude_self)
            assert found.tolist() == [nearest[:k] for nearest in expected]


@pytest.mark.parametrize("value", [0, 1])
def test_of_equal_features_the_first_are_nearest_and_one_search_serves_all(
    value, backend, searched_again, monkeypatch
):
    near, sizes = search.Search._near, []
    monkeypatch.setattr(
        search.Search, "_near", lambda self, query: sizes.append(len(query)) or near(self, query)
    )
    train = np.full((1000, 4), value, np.float32)
    scores, found = answers(train, train[:600], 10)
    assert (found == np.arange(10)).all() and (scores == value - 1).all()
    assert len(searched_again) == 600 and sizes == [1]
    _, found = answers(train, train, 2, exclude_self=True)
    assert found[:3].tolist() == [[1, 2], [0, 2], [0, 1]] and (found[3:] == [0, 1]).all()


def test_zeros_have_cosine_0_with_all(backend):
    train, test = clusters(100, seed=0), clusters(20, seed=1)
    train[[3, 50, 51]] = 0
    test[[0, 7]] = 0
    assert answers(train, test, 60)[1].tolist() == naive(train, test, 60)
    scores, found = answers(train, test, 100)
    assert (scores[7] == -1).all() and (scores[found == 50] == -1).all()


def crowded():
    """Two far apart clusters, each of rows nearer to each other than float32 can tell in a product."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2, 16))
    train, test = (
        (centres[np.arange(count) % 2] + 1e-5 * generator.normal(size=(count, 16))).astype(np.float32)
        for count in (400, 30)
    )
    return train, test


def test_what_float32_leaves_in_doubt_float64_decides(backend, searched_again):
    train, test = crowded()
    _, found = answers(train, test, 10)
    assert found.tolist() == naive(train, test, 10)
    assert len(searched_again) == 30


def test_without_the_second_search_that_would_be_wrong(backend, monkeypatch):
    train, test = crowded()
    monkeypatch.setattr(search._Space, "largest_error", lambda self, query, dtype: np.full(len(query), -1))
    assert answers(train, test, 10)[1].tolist() != naive(train, test, 10)


def test_ordinary_features_leave_nothing_in_doubt(backend, searched_again):
    train, test = clusters(2000, seed=0, width=64), clusters(300, seed=1, width=64)
    answers(train, test, 20)
    assert searched_again == []


@pytest.mark.parametrize("k", [1, 89, 90])
def test_k_up_to_the_training_set(k, backend):
    train, test = clusters(90, seed=0), clusters(5, seed=1)
    assert answers(train, test, k)[1].tolist() == naive(train, test, k)
    other = min(k, 89)
    assert answers(train, train, other, exclude_self=True)[1].tolist() == naive(train, train, other, True)


def test_blocks_and_files_on_disk_change_no_bit(backend, monkeypatch, tmp_path):
    train, test = (clusters(count, seed, width=7).astype(np.float16) for seed, count in enumerate((300, 90)))
    train[100:200] = train[100]
    test[::9] = train[100]
    whole = answers(train, test, 20)
    for name, size in {
        "_ROWS_PER_BLOCK": 13,
        "_QUERIES_PER_SEARCH": 11,
        "_QUERIES_PER_ANSWER": 3,
        "_PAIRS_PER_BLOCK": 9,
        "_SCORES_AT_ONCE": 1,
    }.items():
        monkeypatch.setattr(search, name, size)
    parts = []
    for name, part in {"train": train, "test": test}.items():
        stored = np.memmap(tmp_path / name, np.float16, "w+", shape=part.shape)
        stored[:] = part
        parts.append(np.memmap(tmp_path / name, np.float16, "r", shape=part.shape))
    for got, expected in zip(answers(*parts, 20), whole, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("classes", [2, 1500])
def test_backends_give_the_same_accuracies(classes, monkeypatch):
    train, test = clusters(400, 0, classes), clusters(101, 1, classes)
    labels, test_labels = (
        np.random.default_rng(seed).integers(0, classes, n) for seed, n in ((2, 400), (3, 101))
    )
    ks = (1, 20, 500)
    first = knn_accuracy(train, labels, test, test_labels, ks=ks, num_classes=classes)
    use_torch(monkeypatch)
    second = knn_accuracy(train, labels, test, test_labels, ks=ks, num_classes=classes)
    for k in ks:
        np.testing.assert_array_equal(first[k].predictions, second[k].predictions)
        assert (first[k].top1, first[k].top5) == (second[k].top1, second[k].top5)


def test_torch_searches_in_full_float32_whatever_the_caller_set(monkeypatch, searched_again):
    train, test = clusters(2000, seed=0, width=64), clusters(50, seed=1, width=64)
    expected = answers(train, test, 20)[1]
    use_torch(monkeypatch)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(answers(train, test, 20)[1], expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert searched_again == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spread", SPREADS)
def test_cuda_gives_the_same_bits_as_faiss(spread, monkeypatch, searched_again):
    train, test = (
        SPREADS[spread](clusters(count, seed, width=384)) for seed, count in enumerate((40000, 3000))
    )
    expected = answers(train, test, 200)
    for got, known in zip(answers(train, test, 200, device="cuda"), expected, strict=True):
        np.testing.assert_array_equal(got, known)
    if spread == "far":
        assert searched_again == []


def test_imports_neither_torch_nor_faiss():
    code = "import sys, dino.evaluation.knn; assert not {'torch', 'faiss'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
