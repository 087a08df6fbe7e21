import numpy as np
import pytest
import scipy.stats

from dino.evaluation.paired import paired_difference_over_runs


def test_runs_judged_on_the_same_pictures_are_no_new_pictures():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 200)) < [[0.5], [0.4]]
    once = paired_difference_over_runs(a[None], b[None])
    assert once[0] == pytest.approx(100 * (a.mean() - b.mean()))
    assert once[1] == pytest.approx(scipy.stats.wilcoxon(a.astype(int) - b.astype(int)).pvalue)
    thrice = paired_difference_over_runs(np.stack([a] * 3), np.stack([b] * 3))
    assert thrice == pytest.approx(once)


def test_runs_that_agree_differ_by_nothing():
    same = np.ones((3, 5), bool)
    assert paired_difference_over_runs(same, same) == (0, 1)


@pytest.mark.parametrize("shape", [(2, 4), (5,), (0, 5)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(ValueError, match=r"both must be \(runs, pictures\)"):
        paired_difference_over_runs(np.ones(shape, bool), np.ones((2, 5), bool))
