"""Is one network better than another on the same pictures by more than chance?"""

import numpy as np


def paired_difference(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[float, float]:
    """Accuracy of a minus that of b in percentage points, and the two-sided p-value of McNemar's exact test.

    Only the pictures that one of them gets right and the other wrong tell a from b; by chance each falls on
    either side with probability 1/2.

    Args:
        correct_a, correct_b: (n,) bool, for the same pictures in the same order.
    """
    if correct_a.shape != correct_b.shape or not len(correct_a):
        raise ValueError(f"both must be for the same pictures, got {correct_a.shape} and {correct_b.shape}")
    from scipy.stats import binomtest  # takes over a second, which --help has not

    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return 100 * (only_a - only_b) / len(correct_a), float(p_value)


def paired_difference_over_runs(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[float, float]:
    """The same for several runs of a and of b, judged on the same pictures; Wilcoxon's signed-rank test.

    A picture counts once, with the sum of its differences over the runs: pictures that are hard for one run are
    hard for the others, so counting every run's answers as new pictures would find differences by chance.

    Args:
        correct_a, correct_b: (runs, n) bool, for the same pictures in the same order.
    """
    if correct_a.shape != correct_b.shape or correct_a.ndim != 2 or not correct_a.size:
        raise ValueError(f"both must be (runs, pictures), got {correct_a.shape} and {correct_b.shape}")
    from scipy.stats import wilcoxon

    of_picture = (correct_a.astype(int) - correct_b).sum(axis=0)
    p_value = wilcoxon(of_picture).pvalue if of_picture.any() else 1.0
    return 100 * float(of_picture.mean()) / len(correct_a), float(p_value)
