import numpy as np
import pytest
import torch
from torch import nn

from dino import loss
from dino.teacher import Center, follow, sinkhorn_knopp


def naive_sinkhorn(logits_TBK, temperature, iterations=3):
    """SwAV's algorithm 1 in float64, one prototype and one image at a time."""
    scores = np.exp(np.asarray(logits_TBK, dtype=np.float64).reshape(-1, logits_TBK.shape[-1]) / temperature)
    samples, prototypes = scores.shape
    q = scores / scores.sum()
    for _ in range(iterations):
        for k in range(prototypes):
            q[:, k] /= q[:, k].sum() * prototypes
        for i in range(samples):
            q[i] /= q[i].sum() * samples
    return (q * samples).reshape(logits_TBK.shape)


def test_the_center_moves_by_the_batch_mean_and_only_when_told_to():
    torch.manual_seed(0)
    center, expected = Center(5), torch.zeros(1, 5)
    for _ in range(3):
        logits = torch.randn(2, 4, 5)
        before = center.center.clone()
        targets = center.targets(logits, 0.04)
        assert torch.equal(center.center, before)
        centered = (logits - expected) / 0.04
        torch.testing.assert_close(targets, centered.exp() / centered.exp().sum(-1, keepdim=True))
        center.update(logits)
        expected = 0.9 * expected + 0.1 * logits.reshape(-1, 5).sum(0) / 8
        torch.testing.assert_close(center.center, expected)
    assert list(center.state_dict()) == ["center"] and center.center.shape == (1, 5)


def test_targets_of_half_logits_are_float32():
    logits = torch.randn(2, 3, 9).to(torch.bfloat16)
    for targets in (Center(9).targets(logits, 0.04), sinkhorn_knopp(logits, 0.04)):
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("size", [1, 12])  # one image at a time, and two with one left over
def test_targets_do_not_depend_on_how_many_images_are_worked_on_at_once(size, monkeypatch):
    logits, center = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), Center(5)
    center.update(logits + 1)
    at_once = center.targets(logits, 0.04)
    monkeypatch.setattr(loss, "_BLOCK_ON_CPU", size)
    torch.testing.assert_close(center.targets(logits, 0.04), at_once)


@pytest.mark.parametrize("make_targets", [Center(9).targets, sinkhorn_knopp])
def test_the_logits_are_left_as_they_are_and_get_no_gradient(make_targets):
    logits = torch.randn(2, 3, 9, requires_grad=True)
    before = logits.detach().clone()
    assert not make_targets(logits, 0.04).requires_grad
    assert torch.equal(logits, before)


def test_the_teacher_follows_in_parameters_and_not_in_statistics():
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    student(torch.randn(8, 3))
    names = [name for name, _ in teacher.named_parameters()]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    students = {name: value.clone() for name, value in student.state_dict().items()}
    follow(teacher, student, 0.9)
    for name, value in teacher.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * students[name] if name in names else before[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=name)
    assert all(torch.equal(value, students[name]) for name, value in student.state_dict().items())


def test_momentum_one_freezes_the_teacher_and_zero_copies_the_student():
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    before = teacher.weight.clone()
    follow(teacher, student, 1.0)
    assert torch.equal(teacher.weight, before)
    follow(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)


@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize(("images", "prototypes"), [(1, 3), (6, 4), (3, 40)])
def test_sinkhorn_equals_the_naive_loop_in_float64(images, prototypes, temperature):
    logits = torch.randn(2, images, prototypes, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    targets = sinkhorn_knopp(logits, temperature)
    np.testing.assert_allclose(targets, naive_sinkhorn(logits, temperature), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, images))


def test_sinkhorn_uses_all_prototypes_equally():
    logits = 0.1 * torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    logits[..., 0] += 0.2  # left alone, this one would take most images
    assert logits.div(0.1).softmax(-1).sum((0, 1))[0] > 60
    torch.testing.assert_close(
        sinkhorn_knopp(logits, 0.1).sum((0, 1)), torch.full((4,), 32.0), rtol=0.1, atol=0
    )


def test_sinkhorn_gives_every_image_a_target_however_far_apart_the_logits_are():
    logits = torch.zeros(2, 4, 8)
    logits[0, 0] = 500  # next to this image the exponentials of all others vanish in float32
    logits[1, 2, 3] = -500
    logits[..., 5] -= 1000
    targets = sinkhorn_knopp(logits, 0.02)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(-1), torch.ones(2, 4))
    torch.testing.assert_close(sinkhorn_knopp(logits + 64, 0.02), targets)  # their level means nothing
