import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dino import loss as loss_module
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


@pytest.mark.parametrize("teacher_views", [1, 2])
@pytest.mark.parametrize("views", [2, 3, 10])
@pytest.mark.parametrize("images", [1, 4])
def test_loss_and_gradient_equal_the_double_sum_of_the_paper(teacher_views, views, images):
    torch.manual_seed(views)
    targets = torch.randn(teacher_views, images, 7).mul(2).softmax(-1)
    ours = torch.randn(views, images, 7).requires_grad_()
    naive = ours.detach().double().requires_grad_()
    loss, expected = dino_loss(ours, targets, 0.3), double_sum(naive, targets.double(), 0.3)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, naive.grad.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("total", [0.0, 0.5, 1.3])
def test_gradients_are_right_for_targets_of_any_sum(total):
    torch.manual_seed(0)
    targets = total * torch.rand(2, 3, 5, dtype=torch.float64).softmax(-1)
    logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dino_loss(x, targets, 0.4), logits)
    torch.testing.assert_close(dino_loss(logits, targets, 0.4), double_sum(logits, targets, 0.4))


@pytest.mark.parametrize("size", [1, 14, 20])  # one image, two, and two with one left over
def test_the_size_of_the_blocks_changes_nothing(size, monkeypatch):
    torch.manual_seed(0)
    targets = torch.randn(2, 5, 7).softmax(-1)
    logits = torch.randn(3, 5, 7, requires_grad=True)
    loss = dino_loss(logits, targets, 0.2)
    (gradient,) = torch.autograd.grad(loss, logits)
    monkeypatch.setattr(loss_module, "_BLOCK_ON_CPU", size)
    in_blocks = dino_loss(logits, targets, 0.2)
    torch.testing.assert_close(in_blocks, loss)
    torch.testing.assert_close(torch.autograd.grad(in_blocks, logits), (gradient,))


class LargeTensors(TorchDispatchMode):
    """Counts the memories of at least so many bytes that are made."""

    def __init__(self, size):
        super().__init__()
        self.size, self.kept = size, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= self.size:
                self.kept[tensor.untyped_storage().data_ptr()] = (
                    tensor  # kept, so that no place is used twice
                )
        return result


def test_nothing_as_large_as_a_view_is_made_but_the_gradient(monkeypatch):
    monkeypatch.setattr(loss_module, "_BLOCK_ON_CPU", 64)
    logits = torch.randn(3, 4, 64, requires_grad=True)
    targets = torch.randn(2, 4, 64).softmax(-1)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (logits, targets)}
    with LargeTensors(size=4 * 64 * 4) as made:
        (gradient,) = torch.autograd.grad(dino_loss(logits, targets, 0.1), logits)
    assert made.kept.keys() - inputs == {gradient.untyped_storage().data_ptr()}


def test_it_goes_back_through_its_graph_twice_and_is_not_differentiated_twice():
    logits = torch.randn(3, 2, 5, requires_grad=True)
    loss = dino_loss(logits, torch.randn(2, 2, 5).softmax(-1), 0.1)
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True), first)
    (gradient,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_logits_in_any_order_of_memory_give_the_same_gradient():
    torch.manual_seed(0)
    targets = torch.randn(2, 3, 5).softmax(-1)
    turned = torch.randn(5, 3, 4).requires_grad_()
    straight = turned.detach().permute(2, 1, 0).contiguous().requires_grad_()
    dino_loss(turned.permute(2, 1, 0), targets, 0.1).backward()
    dino_loss(straight, targets, 0.1).backward()
    torch.testing.assert_close(turned.grad.permute(2, 1, 0), straight.grad)


def test_uniform_output_costs_ln_k():
    targets = torch.randn(2, 3, 512).softmax(-1)
    assert dino_loss(torch.zeros(4, 3, 512), targets, 0.1).item() == pytest.approx(math.log(512), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_measured_in_float32_and_get_their_gradient_rounded(dtype):
    torch.manual_seed(0)
    half = torch.randn(3, 2, 64).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    targets = torch.randn(2, 2, 64).softmax(-1)
    losses = [dino_loss(logits, targets, 0.1) for logits in (half, full)]
    assert torch.equal(*losses) and losses[0].dtype == torch.float32
    for loss in losses:
        loss.backward()
    assert torch.equal(half.grad, full.grad.to(dtype))


@pytest.mark.slow
def test_it_compiles():
    logits, targets = torch.randn(3, 2, 64, requires_grad=True), torch.randn(2, 2, 64).softmax(-1)
    compiled = torch.compile(dino_loss, backend="aot_eager")
    losses = [loss(logits, targets, 0.1) for loss in (dino_loss, compiled)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits) for loss in losses))


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
