"""Layers against loops written from the equations, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xcit import layers
from xcit.layers import (
    ClassAttention,
    ClassAttentionBlock,
    CrossCovarianceAttention,
    LocalPatchInteraction,
    XCABlock,
)

DIM, HEADS = 12, 3
WIDTH = DIM // HEADS


def tokens(count: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        dtype
    )


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module.double()


def qkv(attention: nn.Module, x: Tensor, head: int) -> list[Tensor]:
    """Query, key and value of one head of one image: each (tokens, width)."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    rows = [slice(part * DIM + head * WIDTH, part * DIM + (head + 1) * WIDTH) for part in range(3)]
    return [x @ weight[row].T + bias[row] for row in rows]


def test_cross_covariance_attention_equals_the_equation() -> None:
    attention = randomised(CrossCovarianceAttention(DIM, HEADS))
    x = tokens()
    mixed = torch.empty_like(x)
    for image in range(2):
        for head in range(HEADS):
            query, key, value = qkv(attention, x[image], head)
            weights = torch.empty(WIDTH, WIDTH, dtype=x.dtype)
            for i in range(WIDTH):
                for j in range(WIDTH):
                    cosine = query[:, i] @ key[:, j] / (query[:, i].norm() * key[:, j].norm())
                    weights[i, j] = cosine * attention.temperature[head, 0, 0]
            weights = weights.exp() / weights.exp().sum(dim=1, keepdim=True)
            mixed[image, :, head * WIDTH : (head + 1) * WIDTH] = value @ weights.T
    torch.testing.assert_close(attention(x), attention.proj(mixed))


def test_large_activations_do_not_overflow_float16() -> None:
    attention = randomised(CrossCovarianceAttention(DIM, HEADS)).float()
    x = 50 * tokens(count=400, dtype=torch.float32)
    assert attention.qkv(x).square().sum(dim=1).max() > torch.finfo(torch.float16).max
    expected = attention(x)
    actual = attention.half()(x.half()).float()
    assert (actual - expected).norm() < 0.01 * expected.norm()


def test_a_patch_reaches_two_rows_and_two_columns_far() -> None:
    rows, cols = 7, 9
    interaction = randomised(LocalPatchInteraction(DIM)).eval()
    x = torch.zeros(1, rows, cols, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[0, 3, 5] = 1.0
    difference = interaction(changed.flatten(1, 2), rows, cols) - interaction(x.flatten(1, 2), rows, cols)
    touched = difference.reshape(rows, cols, DIM).abs().sum(dim=-1) > 1e-9
    expected = torch.zeros(rows, cols, dtype=torch.bool)
    expected[1:6, 3:8] = True
    assert torch.equal(touched, expected)


def test_class_attention_equals_the_equation() -> None:
    attention = randomised(ClassAttention(DIM, HEADS))
    x = tokens()
    mixed = torch.empty(2, 1, DIM, dtype=x.dtype)
    for image in range(2):
        for head in range(HEADS):
            query, key, value = qkv(attention, x[image], head)
            scores = torch.stack([query[0] @ each / WIDTH**0.5 for each in key])
            weights = scores.exp() / scores.exp().sum()
            torch.testing.assert_close(attention.weights(x)[image, head, 0], weights)
            mixed[image, 0, head * WIDTH : (head + 1) * WIDTH] = weights @ value
    torch.testing.assert_close(attention(x), attention.proj(mixed))


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_class_attention_block_keeps_the_published_departures(tokens_norm: bool) -> None:
    block = randomised(
        ClassAttentionBlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0, tokens_norm=tokens_norm)
    )
    x = tokens()
    normed = block.norm1(x)
    patches = x[:, 1:] + block.gamma1 * normed[:, 1:]
    patches = block.norm2(patches) if tokens_norm else patches
    class_token = block.norm2(x[:, :1] + block.gamma1 * block.attn(normed))
    result = block(x)
    torch.testing.assert_close(result[:, 1:], 2 * patches)
    torch.testing.assert_close(result[:, :1], class_token + block.gamma2 * block.mlp(class_token))


def xca_block(x: Tensor) -> Tensor:
    block = XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=1.0, eta=1.0).eval()
    return randomised(block)(x, 2, 3)


def class_block(x: Tensor) -> Tensor:
    block = ClassAttentionBlock(dim=DIM, num_heads=HEADS, mlp_ratio=1.0, eta=1.0, tokens_norm=False)
    return randomised(block)(x)


@pytest.mark.parametrize("block", [xca_block, class_block])
def test_gradients_agree_with_finite_differences(block: Callable[[Tensor], Tensor]) -> None:
    x = tokens()[:1].requires_grad_()
    assert torch.autograd.gradcheck(block, x, fast_mode=True)


def test_a_dropped_path_leaves_the_residual_alone() -> None:
    block = randomised(XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=1.0, eta=1.0, drop_path_rate=1 - 1e-9))
    x = tokens()
    assert torch.equal(block.train()(x, 2, 3), x)
    assert not torch.equal(block.eval()(x, 2, 3), x)


def dropped_by_hand(block: XCABlock, x: Tensor) -> Tensor:
    """The block with every branch computed for all images and multiplied by what `factors` draws."""
    for gamma, branch in (
        (block.gamma1, lambda each: block.attn(block.norm1(each))),
        (block.gamma3, lambda each: block.local_mp(block.norm3(each), 2, 3)),
        (block.gamma2, lambda each: block.mlp(block.norm2(each))),
    ):
        factors = torch.empty(len(x), 1, 1, dtype=x.dtype).bernoulli_(0.5) / 0.5
        x = x + factors * gamma * branch(x)
    return x


def test_images_that_skip_a_branch_change_neither_results_nor_gradients() -> None:
    block = randomised(XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0, drop_path_rate=0.5)).train()
    x = torch.randn(8, 6, DIM, dtype=torch.float64, requires_grad=True)
    direction, parts, seen = torch.randn_like(x), [x, *block.parameters()], []
    block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    results, gradients = [], []
    for forward in (lambda: block(x, 2, 3), lambda: dropped_by_hand(block, x)):
        torch.manual_seed(3)
        results.append(forward())
        gradients.append(torch.autograd.grad(results[-1], parts, direction))
    assert seen[0] < seen[1] == 8
    torch.testing.assert_close(results[0], results[1])
    for ours, by_hand in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, by_hand)


@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_the_block_gives_the_same_and_leaves_its_input_alone(training: bool) -> None:
    block = randomised(XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0)).train(training)
    x = tokens()
    before, expected = x.clone(), block(x, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(block(x, 2, 3), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("count", [6, 45])
def test_without_gradients_the_layout_of_the_input_does_not_matter(count: int) -> None:
    block = randomised(XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0)).eval()
    x = tokens(count=count)
    channels_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    longer = torch.cat([x[:, :1], x], dim=1)[:, 1:]
    expected = block(x, count // 3, 3)
    with torch.no_grad():
        for same in (channels_first, longer):
            assert not same.is_contiguous()
            torch.testing.assert_close(block(same, count // 3, 3), expected)


class CountedOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def test_elsewhere_than_on_a_cpu_more_images_and_tokens_take_no_more_operations() -> None:
    block = XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0).eval().to("meta")
    counts = []
    for images, side in ((2, 2), (64, 100)):
        with torch.no_grad(), CountedOperations() as operations:
            assert block(torch.empty(images, side**2, DIM, device="meta"), side, side).shape[0] == images
        counts.append(operations.count)
    assert counts[0] == counts[1] > 0


def test_the_class_token_alone_is_that_of_all_tokens() -> None:
    for tokens_norm in (True, False):
        block = ClassAttentionBlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0, tokens_norm=tokens_norm)
        randomised(block)
        assert torch.equal(block(tokens(), class_only=True), block(tokens())[:, :1])


@pytest.mark.parametrize(("rows", "cols"), [(9, 5), (45, 1), (1, 45), (7, 8)])
@pytest.mark.parametrize("training", [False, True])
def test_many_tokens_without_gradients_get_the_same(
    rows: int, cols: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(layers, "_TOKENS_OF_BAND", 3 * cols)
    block = randomised(XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0)).train(training)
    block.local_mp.bn.running_mean.normal_()
    x = tokens(count=rows * cols)
    assert rows * cols >= layers._MANY_TOKENS * DIM
    before, expected = x.clone(), block(x, rows, cols)
    block.attn.register_forward_pre_hook(lambda *_: pytest.fail("queries of all tokens"))
    with torch.no_grad():
        torch.testing.assert_close(block(x, rows, cols), expected)
    assert torch.equal(x, before)


def test_batch_norm_without_running_statistics_sees_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_TOKENS_OF_BAND", 10)
    block = randomised(XCABlock(dim=DIM, num_heads=HEADS, mlp_ratio=2.0, eta=1.0)).eval()
    block.local_mp.bn.running_mean = block.local_mp.bn.running_var = None
    x, expected = tokens(count=45), block(tokens(count=45), 9, 5)
    with torch.no_grad():
        torch.testing.assert_close(block(x, 9, 5), expected)
