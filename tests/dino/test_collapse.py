import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from dino.collapse import CollapseWatch, diagnose, effective_rank, feature_measures, output_measures
from dino.teacher import sinkhorn_knopp

UNIFORM = {"loss_over_ln_k": 1.0, "teacher_entropy": math.log(65536)}
HEALTHY = {"loss_over_ln_k": 0.6, "teacher_entropy": 3.0, "entropy_of_mean_teacher": 8.0, "mean_cosine": 0.4}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def pairs_cross_entropy(targets_TBK, student_VBK):
    pairs = [(t, v) for t in range(len(targets_TBK)) for v in range(len(student_VBK)) if t != v]
    return torch.stack(
        [F.cross_entropy(student_VBK[v], targets_TBK[t], reduction="mean") for t, v in pairs]
    ).mean(), pairs


def test_entropies_and_kl_equal_scipy_and_torch(generator):
    targets = torch.randn(2, 5, 7, generator=generator).mul(3).softmax(-1)
    student = torch.randn(4, 5, 7, generator=generator)
    loss, pairs = pairs_cross_entropy(targets, student)
    measures = output_measures(targets, loss)

    kl = [F.kl_div(student[v].log_softmax(-1), targets[t], reduction="batchmean") for t, v in pairs]
    assert measures["kl"].item() == pytest.approx(torch.stack(kl).mean().item(), abs=1e-5)
    expected = scipy.stats.entropy(targets.numpy(), axis=-1).mean()
    assert measures["teacher_entropy"].item() == pytest.approx(expected, abs=1e-5)
    expected = scipy.stats.entropy(targets.numpy().reshape(-1, 7).mean(0))
    assert measures["entropy_of_mean_teacher"].item() == pytest.approx(expected, abs=1e-5)
    assert measures["loss_over_ln_k"].item() == pytest.approx(loss.item() / math.log(7), abs=1e-6)


def test_measures_are_float32_without_gradient_from_half_inputs(generator):
    features = torch.randn(6, 4, generator=generator, dtype=torch.bfloat16).requires_grad_()
    targets = torch.eye(4, dtype=torch.bfloat16)[None].requires_grad_()
    measures = output_measures(targets, targets.sum()) | feature_measures(features)
    for value in measures.values():
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
    assert measures["teacher_entropy"] == 0  # 0 ln 0 = 0
    assert measures["entropy_of_mean_teacher"].item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("pictures", [2, 9])
def test_feature_measures_equal_the_naive_loops(pictures, generator):
    features = torch.randn(pictures, 5, generator=generator)
    measures = feature_measures(features)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(pictures) for j in range(pictures) if i != j]
    assert measures["mean_cosine"].item() == pytest.approx(np.mean(cosines), abs=1e-5)
    assert measures["feature_std"].item() == pytest.approx(unit.std(axis=0).mean() * 5**0.5, abs=1e-5)
    singular = scipy.stats.entropy(np.linalg.svd(features.numpy(), compute_uv=False))
    assert measures["effective_rank"].item() == pytest.approx(np.exp(singular), abs=1e-4)


def test_features_spread_over_the_sphere_have_scaled_deviation_one(generator):
    assert feature_measures(torch.randn(4096, 16, generator=generator))[
        "feature_std"
    ].item() == pytest.approx(1, abs=0.02)


def test_effective_rank_is_c_for_an_identity_and_one_for_one_direction():
    assert effective_rank(torch.eye(6)).item() == pytest.approx(6, abs=1e-4)
    assert effective_rank(3 * torch.eye(6).repeat(4, 1)).item() == pytest.approx(6, abs=1e-4)
    assert effective_rank(torch.outer(torch.arange(1.0, 9), torch.ones(6))).item() == pytest.approx(
        1, abs=1e-3
    )
    assert effective_rank(torch.zeros(3, 3)).item() == pytest.approx(1)


def test_features_that_are_not_finite_are_measured_as_nan_and_do_not_raise():
    measures = feature_measures(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    assert all(value.isnan() for value in measures.values())


def test_one_picture_cannot_be_compared_with_others():
    targets = F.one_hot(torch.zeros(2, 1, dtype=torch.long), 8).float()
    measures = output_measures(targets, torch.tensor(0.5)) | feature_measures(torch.ones(1, 4))
    assert measures["entropy_of_mean_teacher"].isnan() and measures["mean_cosine"].isnan()
    watch = CollapseWatch(8, patience_steps=1, ignore_steps=0)
    watch.update({name: float(value) for name, value in measures.items()})
    assert watch.verdict() is None


def measured_diagnosis(targets_TBK, logits_VBK, features_BC):
    loss, _ = pairs_cross_entropy(targets_TBK, logits_VBK)
    measures = output_measures(targets_TBK, loss) | feature_measures(features_BC)
    watch = CollapseWatch(targets_TBK.shape[-1], patience_steps=1, ignore_steps=0)
    watch.update({name: float(value) for name, value in measures.items()})
    return watch.verdict()


def test_uniform_output_is_named_with_ln_k(generator):
    logits = 1e-3 * torch.randn(4, 8, 65536, generator=generator)
    diagnosis = measured_diagnosis(logits[:2].softmax(-1), logits, torch.randn(8, 6, generator=generator))
    assert diagnosis.startswith("output is uniform: loss is within 0.1% of ln(65536) = 11.09")
    assert "--teacher_temp" in diagnosis and "--momentum_teacher" in diagnosis


def test_constant_output_is_named(generator):
    logits = torch.zeros(4, 8, 512)
    logits[..., 3] = 20
    diagnosis = measured_diagnosis(logits[:2].softmax(-1), logits, torch.randn(8, 6, generator=generator))
    assert diagnosis.startswith(
        "output is constant: every picture gets the same prototype (entropy of the mean"
    )
    assert "--teacher_temp" in diagnosis and "--lr" in diagnosis


def test_constant_features_are_named(generator):
    logits = F.one_hot(torch.arange(8), 512).float().mul(20).repeat(4, 1, 1)
    features = 1 + 1e-3 * torch.randn(8, 6, generator=generator)
    diagnosis = measured_diagnosis(logits[:2].softmax(-1), logits, features)
    assert diagnosis.startswith(
        "features are constant: all pictures have the same feature (mean cosine 1.0000)"
    )


def test_a_clustering_that_works_gets_no_diagnosis(generator):
    assigned = torch.randint(0, 512, (8,), generator=generator)
    logits = 8 * F.one_hot(assigned, 512).float().repeat(4, 1, 1) + torch.randn(
        4, 8, 512, generator=generator
    )
    assert measured_diagnosis(logits[:2].softmax(-1), logits, torch.randn(8, 6, generator=generator)) is None


@pytest.mark.parametrize("teacher_entropy", [3.0, math.nan])
def test_a_student_at_ln_k_under_a_sharp_teacher_is_not_uniform_output(teacher_entropy):
    assert diagnose(num_prototypes=4096, loss=math.log(4096), teacher_entropy=teacher_entropy) is None


def test_watch_waits_for_the_ignored_steps_and_then_for_its_patience():
    watch = CollapseWatch(65536, patience_steps=3, ignore_steps=4)
    verdicts = []
    for measures in [UNIFORM] * 6 + [HEALTHY] + [UNIFORM] * 3 + [HEALTHY]:
        watch.update(measures)
        verdicts.append(watch.verdict() is not None)
    assert verdicts == [False] * 9 + [True, False]
    assert watch.verdict() is None  # asking changes nothing


def test_watch_refuses_a_patience_of_zero():
    with pytest.raises(ValueError, match="patience_steps >= 1 and ignore_steps >= 0, got 8, 0 and 0"):
        CollapseWatch(8, patience_steps=0, ignore_steps=0)


def test_sinkhorn_knopp_targets_of_constant_features_are_named_although_they_are_balanced():
    logits = torch.zeros(4, 8, 128)
    logits[..., 3] = 1
    targets = sinkhorn_knopp(logits[:2], temperature=0.02)
    student = torch.zeros(4, 8, 128)
    assert measured_diagnosis(targets, student, torch.ones(8, 6)).startswith("output is uniform")
