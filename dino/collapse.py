"""Is it learning? Measures of a DINO step, and plain names for the ways it fails (DINO, section 5.3).

A run fails by a uniform output (every prototype as likely as any other, loss = ln K), by a constant output
(one prototype for every picture), or by one feature for every picture.
"""
# T = teacher views, B = pictures, C = channels, K = prototypes

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# A collapsed run sits on ln K to four digits; one that learns is away from it by percents.
_LOSS_TOLERANCE = 1e-3
_UNIFORM_ENTROPY = 0.99  # share of ln K from which the teacher tells no prototype from another
_CONSTANT_ENTROPY = 0.01  # share of ln K under which one prototype has taken the whole batch
_SAME_FEATURE_COSINE = 0.9995  # random networks are near 0.998, so less than this is no failure


@torch.no_grad()
def output_measures(targets_TBK: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
    """Scalars in nats, float32, on the device of the targets.

    Args:
        targets_TBK: the teacher's probabilities.
        cross_entropy: the DINO loss without other terms (DINO, eq. 3).

    Returns:
        `teacher_entropy`: H(t), the mean over pictures and views, in [0, ln K];
        `entropy_of_mean_teacher`: how evenly the batch uses the prototypes, in [0, ln K]; always high after
        Sinkhorn-Knopp, so it tells nothing there; nan for one picture, which can use only its own;
        `kl`: KL(t || s), the part of the loss that the student can remove;
        `loss_over_ln_k`: 1 is what a uniform student pays.
    """
    _, pictures, prototypes = targets_TBK.shape
    # View by view: their logarithms at once would be as large as the targets.
    teacher_entropy = torch.stack([_entropy(target_BK.float()).mean() for target_BK in targets_TBK]).mean()
    entropy_of_mean = _entropy(targets_TBK.mean(dim=(0, 1), dtype=torch.float32))
    cross_entropy = cross_entropy.float()
    return {
        "teacher_entropy": teacher_entropy,
        "entropy_of_mean_teacher": entropy_of_mean
        if pictures > 1
        else torch.full_like(entropy_of_mean, math.nan),
        # Every teacher view is in equally many pairs, so the mean of H(t) over pairs is its mean over views.
        "kl": cross_entropy - teacher_entropy,
        "loss_over_ln_k": cross_entropy / math.log(prototypes),
    }


def _entropy(probabilities_K: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return torch.special.entr(probabilities_K).sum(dim=-1)


@torch.no_grad()
def feature_measures(features_BC: Tensor) -> dict[str, Tensor]:
    """Scalars, float32, on the device of the features, which are one row per picture (not per view).

    Returns:
        `feature_std`: standard deviation of the L2-normalised features, mean over channels, times sqrt(C):
        0 = all the same, 1 = spread over the whole sphere;
        `effective_rank`: see `effective_rank`;
        `mean_cosine`: between different pictures, in [-1, 1]; nan for one picture.
    """
    features_BC = features_BC.float()
    pictures, channels = features_BC.shape
    unit_BC = F.normalize(features_BC, dim=-1)
    # All pairs without a B x B matrix: |sum of z|^2 holds each pair twice and each picture with itself once.
    pairs = unit_BC.sum(dim=0).square().sum() - unit_BC.square().sum()
    return {
        "feature_std": unit_BC.std(dim=0, correction=0).mean() * math.sqrt(channels),
        "effective_rank": effective_rank(features_BC),
        "mean_cosine": pairs / (pictures * (pictures - 1))
        if pictures > 1
        else torch.full_like(pairs, math.nan),
    }


@torch.no_grad()
def effective_rank(features_BC: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007), in [1, min(B, C)].

    Features that are not finite have the rank nan.
    """
    features_BC = features_BC.float()
    if features_BC.device.type == "mps":
        features_BC = features_BC.cpu()  # MPS has no singular values
    finite = features_BC.isfinite().all()
    # The decomposition raises on nan, and a measure must not stop a run.
    singular = torch.linalg.svdvals(torch.where(finite, features_BC, 0.0))
    shares = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny)
    return torch.where(finite, torch.special.entr(shares).sum().exp(), math.nan)


def diagnose(
    *,
    num_prototypes: int,
    loss: float,
    teacher_entropy: float,
    entropy_of_mean_teacher: float = math.nan,
    mean_cosine: float = math.nan,
) -> str | None:
    """The failure in one sentence with the settings to change, or None; nan = not measured.

    Says nothing about a fresh network, which looks like a failed one: see `CollapseWatch`.

    Args:
        loss: the DINO loss alone, in nats.
        teacher_entropy, entropy_of_mean_teacher, mean_cosine: of `output_measures` and `feature_measures`.
    """
    ln_k = math.log(num_prototypes)
    if abs(loss / ln_k - 1) <= _LOSS_TOLERANCE and teacher_entropy >= _UNIFORM_ENTROPY * ln_k:
        return (
            f"output is uniform: loss is within {_LOSS_TOLERANCE:.1%} of ln({num_prototypes}) = {ln_k:.2f}, "
            "and the teacher tells no prototype from another. Lower --teacher_temp and --warmup_teacher_temp "
            "(0.04 -> 0.02); in a short run lower --momentum_teacher (0.996 -> 0.99); or use "
            "--centering sinkhorn_knopp."
        )
    if entropy_of_mean_teacher <= _CONSTANT_ENTROPY * ln_k:
        return (
            "output is constant: every picture gets the same prototype (entropy of the mean teacher output "
            f"{entropy_of_mean_teacher:.3f}, of at most ln({num_prototypes}) = {ln_k:.2f}). Raise "
            "--teacher_temp (0.04 -> 0.07, with --warmup_teacher_temp_epochs 30); lower --lr; or use "
            "--centering sinkhorn_knopp."
        )
    if mean_cosine >= _SAME_FEATURE_COSINE:
        return (
            f"features are constant: all pictures have the same feature (mean cosine {mean_cosine:.4f}). "
            "Lower --lr; raise --warmup_epochs; or keep the features apart with --koleo_weight 0.1."
        )
    return None


class CollapseWatch:
    """Warns of a failure that lasts.

    A loss of ln K and features that are all alike are normal at initialisation: the first steps do not count.

    Args:
        num_prototypes: K, the width of the output.
        patience_steps: updates in a row, at least 1, that must show a failure before it is named.
        ignore_steps: first updates that do not count: the warm-up, and the epochs of a frozen last layer.
    """

    def __init__(self, num_prototypes: int, patience_steps: int, ignore_steps: int) -> None:
        if num_prototypes < 2 or patience_steps < 1 or ignore_steps < 0:
            raise ValueError(
                "a watch needs num_prototypes >= 2, patience_steps >= 1 and ignore_steps >= 0, "
                f"got {num_prototypes}, {patience_steps} and {ignore_steps}"
            )
        self.num_prototypes = num_prototypes
        self.patience_steps = patience_steps
        self.ignore_steps = ignore_steps
        self._updates = 0
        self._failures_in_a_row = 0
        self._diagnosis: str | None = None

    def update(self, measures: Mapping[str, float]) -> None:
        """Take one step's `output_measures` and `feature_measures`; other names are ignored."""
        self._updates += 1
        if self._updates <= self.ignore_steps:
            return
        self._diagnosis = diagnose(
            num_prototypes=self.num_prototypes,
            loss=measures["loss_over_ln_k"] * math.log(self.num_prototypes),
            teacher_entropy=measures["teacher_entropy"],
            entropy_of_mean_teacher=measures.get("entropy_of_mean_teacher", math.nan),
            mean_cosine=measures.get("mean_cosine", math.nan),
        )
        self._failures_in_a_row = self._failures_in_a_row + 1 if self._diagnosis else 0

    def verdict(self) -> str | None:
        """The failure that the last `patience_steps` updates all showed, as `diagnose` puts it, or None."""
        return self._diagnosis if self._failures_in_a_row >= self.patience_steps else None
