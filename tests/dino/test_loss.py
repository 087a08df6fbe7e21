import math

import pytest
import torch

from dino.loss import dino_loss, koleo_loss

GENERATOR = torch.Generator().manual_seed(0)


def double_sum(student_VBK, targets_TBK, temperature):
    """DINO's equation 3, picture by picture: mean over pairs of different views of -sum p_t ln p_s."""
    costs = []
    for t, target in enumerate(targets_TBK):
        for v, logits in enumerate(student_VBK):
            if v != t:
                for picture in range(len(logits)):
                    p_s = torch.exp(logits[picture] / temperature)
                    p_s = p_s / p_s.sum()
                    costs.append(-(target[picture] * torch.log(p_s)).sum())
    return torch.stack(costs).mean()


@pytest.mark.parametrize("views", [2, 3, 10])
@pytest.mark.parametrize("images", [1, 4])
def test_loss_and_gradient_equal_the_double_sum_of_the_paper(views, images):
    torch.manual_seed(views)
    targets = torch.randn(2, images, 7).mul(2).softmax(-1)
    ours = torch.randn(views, images, 7).requires_grad_()
    naive = ours.detach().clone().requires_grad_()
    loss, expected = dino_loss(ours, targets, 0.3), double_sum(naive, targets, 0.3)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-5, atol=1e-7)
    assert loss.dtype == torch.float32


def test_uniform_output_costs_ln_k():
    targets = torch.randn(2, 3, 512).softmax(-1)
    assert dino_loss(torch.zeros(4, 3, 512), targets, 0.1).item() == pytest.approx(math.log(512), rel=1e-6)


def test_half_logits_are_measured_in_float32():
    logits = torch.randn(3, 2, 64).to(torch.bfloat16)
    targets = torch.randn(2, 2, 64).softmax(-1)
    assert torch.equal(dino_loss(logits, targets, 0.1), dino_loss(logits.float(), targets, 0.1))


@pytest.mark.parametrize("views", [0, 1])
def test_fewer_than_two_views_are_refused(views):
    with pytest.raises(ValueError, match=f"^the loss compares .* at least 2 are needed, got {views}$"):
        dino_loss(torch.zeros(views, 2, 5), torch.zeros(1, 2, 5), 0.1)


@pytest.mark.parametrize("features", [torch.randn(6, 5, generator=GENERATOR), torch.tensor([[2.0], [-1.0]])])
def test_koleo_equals_a_naive_loop(features):
    unit = [row / row.norm() for row in features]
    nearest = [min((a - b).norm() for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    expected = -sum(math.log(distance) for distance in nearest) / len(unit)
    assert koleo_loss(features).item() == pytest.approx(expected, abs=1e-5)
    assert koleo_loss(10 * features).item() == pytest.approx(expected, abs=1e-5)


def test_descending_koleo_pushes_the_nearest_pictures_apart():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.5]], requires_grad=True)
    koleo_loss(features).backward()
    gap = (features.grad[1] - features.grad[0])[1]
    assert gap < 0


def test_koleo_of_identical_pictures_is_finite_with_finite_gradients():
    features = torch.ones(4, 96, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


def test_koleo_of_a_single_picture_is_zero():
    features = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss == 0 and (features.grad == 0).all()
