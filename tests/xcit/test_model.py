"""XCiT against timm's independent implementation, and its promises."""

import itertools
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import xcit
from xcit import XCiT

# Architecture: parameters with 1000 classes, tensors of the state dict (measured on the authors' code).
COUNTS = {
    "xcit_nano_12_p16": (3_053_224, 383),
    "xcit_tiny_12_p16": (6_716_272, 383),
    "xcit_tiny_24_p16": (12_116_896, 707),
    "xcit_small_12_p16": (26_253_304, 383),
    "xcit_small_24_p16": (47_671_384, 707),
    "xcit_medium_24_p16": (84_395_752, 707),
    "xcit_large_24_p16": (189_096_136, 707),
    "xcit_nano_12_p8": (3_049_016, 377),
    "xcit_tiny_12_p8": (6_706_504, 377),
    "xcit_tiny_24_p8": (12_107_128, 701),
    "xcit_small_12_p8": (26_213_032, 377),
    "xcit_small_24_p8": (47_631_112, 701),
    "xcit_medium_24_p8": (84_323_624, 701),
    "xcit_large_24_p8": (188_932_648, 701),
}


def pico(num_classes: int = 5, **options: Any) -> XCiT:
    torch.manual_seed(0)
    return randomised(xcit.create_model("xcit_pico_3_p8", num_classes=num_classes, **options))


def randomised(model: XCiT) -> XCiT:
    """Move what starts at 0 and 1, where many mistakes would cancel."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name.endswith("running_var"):
            tensor.detach().uniform_(0.5, 2)
        elif tensor.is_floating_point() and (tensor.ndim < 2 or "temperature" in name):
            tensor.detach().add_(0.3 * torch.randn_like(tensor))
    return model


def pictures(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def timm_twin(model: XCiT, name: str) -> nn.Module:
    """timm's model with the same weights, renamed by timm's own conversion."""
    twin = timm.create_model(f"{name}_224", num_classes=model.num_classes)
    twin.load_state_dict(timm.models.xcit.checkpoint_filter_fn(model.state_dict(), twin))
    return twin


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("xcit_nano_12_p16", (37, 64)),
        ("xcit_nano_12_p16", (225, 517)),
        ("xcit_nano_12_p8", (37, 64)),
        ("xcit_tiny_12_p16", (37, 64)),
        ("xcit_tiny_12_p8", (37, 64)),
        ("xcit_tiny_24_p16", (37, 64)),
        ("xcit_nano_12_p8", (225, 517)),
    ],
)
def test_logits_equal_timms_on_the_same_weights(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = randomised(xcit.create_model(name, num_classes=1000)).eval()
    twin, images = timm_twin(model, name).eval(), pictures(2, 3, *size)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(logits, twin(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            model.forward_features(images), twin.forward_features(images), atol=1e-4, rtol=1e-4
        )
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", ["xcit_nano_12_p16", "xcit_tiny_12_p8"])
def test_a_training_step_has_timms_gradients_and_statistics(name: str) -> None:
    torch.manual_seed(0)
    model = randomised(xcit.create_model(name, num_classes=10)).train()
    twin, images = timm_twin(model, name).train(), pictures(2, 3, 37, 64)
    for network in (model, twin):
        F.cross_entropy(network(images), torch.tensor([1, 7])).backward()
    for ours, theirs in (
        (model.patch_embed.proj[0][0].weight.grad, twin.patch_embed.proj[0][0].weight.grad),
        (model.cls_token.grad, twin.cls_token.grad),
        (model.blocks[0].local_mp.bn.running_var, twin.blocks[0].local_mp.bn.running_var),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", xcit.list_models())
def test_counts_are_the_published_ones_and_every_variant_trains(name: str) -> None:
    with torch.device("meta"):
        model = xcit.create_model(name, num_classes=1000, drop_path_rate=0.1)
        model(torch.empty(2, 3, 32, 32)).sum().backward()
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == COUNTS[name]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", xcit.list_models())
def test_every_architecture_is_timms(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = xcit.create_model(name), timm.create_model(f"{name}_224", num_classes=0)
        ours(torch.empty(1, 3, 32, 32))
    assert ours.patch_size == theirs.patch_embed.patch_size
    for our_block, their_block in zip(ours.blocks, theirs.blocks, strict=True):
        assert our_block.attn.num_heads == their_block.attn.num_heads
        assert our_block.gamma1.shape == their_block.gamma1.shape
    for our_block, their_block in zip(ours.cls_attn_blocks, theirs.cls_attn_blocks, strict=True):
        assert our_block.attn.num_heads == their_block.attn.num_heads
        assert our_block.tokens_norm == their_block.tokens_norm
    depth = len(theirs.blocks)
    assert xcit.zoo.ARCHITECTURES[name].eta == (1.0 if depth == 12 else 1e-5)


@pytest.mark.parametrize("tokens_norm", [True, False])
def test_a_step_along_the_gradient_lowers_the_loss(tokens_norm: bool) -> None:
    torch.manual_seed(0)
    model = XCiT(
        patch_size=8, embed_dim=32, depth=2, num_heads=2, eta=1.0, tokens_norm=tokens_norm, num_classes=3
    )
    images, labels = pictures(4, 3, 32, 40), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_train(dtype: torch.dtype) -> None:
    model, images = pico().eval(), pictures(2, 3, 40, 56)
    expected = model(images)
    model.to(dtype)
    logits = model(images.to(dtype))
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.05)
    model.train()(images.to(dtype)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.class_attention(images.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype: torch.dtype) -> None:
    model, images = pico(), pictures(2, 3, 40, 56)
    with torch.autocast("cpu", dtype):
        logits = model(images)
        assert model.class_attention(images).dtype == torch.float32
    logits.float().sum().backward()
    assert logits.dtype == dtype
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_one_type_comes_back_in_training_and_evaluation() -> None:
    model, images = pico(), pictures(2, 3, 40, 56)
    for network in (model.train(), model.eval()):
        assert type(network(images)) is Tensor
        assert network(images).shape == (2, 5)


def test_without_a_head_the_class_token_comes_back() -> None:
    model, images = pico(num_classes=0).eval(), pictures(2, 3, 40, 56)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 1 + 5 * 7, model.num_features)
    assert torch.equal(model(images), tokens[:, 0])
    assert not any(name.startswith("head") for name in model.state_dict())


def test_the_classifier_can_be_replaced() -> None:
    model, images = pico().bfloat16().eval(), pictures(2, 3, 40, 56).bfloat16()
    model.reset_classifier(9)
    assert model(images).shape == (2, 9)
    assert model.num_classes == 9
    assert torch.equal(
        model.get_classifier()(model.forward_head(model.forward_features(images), True)), model(images)
    )
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("in_chans", [1, 5])
def test_any_number_of_channels(in_chans: int) -> None:
    assert pico(in_chans=in_chans)(pictures(2, in_chans, 16, 24)).shape == (2, 5)


def test_images_must_be_a_batch() -> None:
    with pytest.raises(
        ValueError, match=r"^images must be \(images, channels, height, width\), got \(3, 8, 8\)$"
    ):
        pico()(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("pool", [None, "", "token"])
def test_the_classifier_is_reset_as_in_timm(pool: str | None) -> None:
    model = pico()
    model.reset_classifier(0, pool)
    assert isinstance(model.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="pools by its class token"):
        model.reset_classifier(3, global_pool="avg")


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"^embed_dim must be a multiple of num_heads, got 32 and 3$"):
        XCiT(patch_size=8, embed_dim=32, depth=1, num_heads=3, eta=1.0)


@pytest.mark.parametrize("tokens_norm", [True, False])
@pytest.mark.parametrize(("block", "index"), [(0, 0), (-2, 0), (1, 1), (-1, 1)])
def test_class_attention_is_the_softmax_of_the_block(block: int, index: int, tokens_norm: bool) -> None:
    torch.manual_seed(0)
    model = XCiT(patch_size=8, embed_dim=32, depth=2, num_heads=4, eta=1.0, tokens_norm=tokens_norm)
    randomised(model).eval()
    attention = model.cls_attn_blocks[index].attn
    seen: list[Tensor] = []
    attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = pictures(2, 3, 37, 64)
    model(images)
    query, key, _ = (seen[0] @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=-1)
    query, key = (each.unflatten(-1, (4, 8)) for each in (query[:, 0], key))
    scores = torch.einsum("bhd,bnhd->bhn", query, key) / 8**0.5
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    maps = model.class_attention(images, block=block)
    assert maps.shape == (2, 4, 5, 8)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.flatten(2), weights[:, :, 1:], atol=1e-6, rtol=0)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), 1 - weights[:, :, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_looking_at_attention_changes_no_bit_of_the_logits(training: bool) -> None:
    model, images = pico().eval(), pictures(2, 3, 37, 64)
    before = model(images)
    model.train(training).class_attention(images)
    assert torch.equal(model.eval()(images), before)


@pytest.mark.parametrize("block", [-3, 2])
def test_there_are_two_class_attention_blocks(block: int) -> None:
    with pytest.raises(IndexError, match=rf"^block must be -2, -1, 0 or 1 \(there are 2\), got {block}$"):
        pico().class_attention(torch.zeros(1, 3, 8, 8), block=block)


def test_checkpointing_changes_neither_gradients_nor_statistics() -> None:
    images = pictures(2, 3, 40, 56)
    models = [pico(), pico()]
    models[1].set_grad_checkpointing()
    for model in models:
        model.train()(images).square().sum().backward()
    for (name, plain), recomputed in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(plain.grad, recomputed.grad), name
    for (name, plain), recomputed in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(plain, recomputed), name


def test_checkpointing_keeps_fewer_activations() -> None:
    def kept(enable: bool) -> int:
        model = pico().train()
        model.set_grad_checkpointing(enable)
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pictures(2, 3, 40, 56))
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_is_linear_in_pixels() -> None:
    def largest(height: int, width: int) -> int:
        with torch.device("meta"):
            model, images = pico().eval(), torch.empty(1, 3, height, width)
        with torch.no_grad(), LargestTensor() as mode:
            model(images)
            model.class_attention(images)
        return mode.elements

    assert largest(4000, 6000) <= 250 * largest(240, 400)


def operations(model: nn.Module, *size: int) -> int:
    """Multiplications and additions of a forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops()


def test_time_is_linear_in_pixels_and_class_attention_has_one_query() -> None:
    with torch.device("meta"):
        model, twin = xcit.create_model("xcit_small_12_p16"), timm.create_model("xcit_small_12_p16_224")
    assert operations(model, 448, 448) / operations(model, 224, 224) == pytest.approx(4, rel=0.01)
    assert operations(model, 224, 224) <= operations(twin, 224, 224)
    block, tokens, width = model.cls_attn_blocks[0].attn, 785, model.embed_dim
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(torch.empty(1, tokens, width, device="meta"))
    # Query, its way through the keys' weight, value and projection; logits and mean token of each head.
    one_token, all_tokens = 4 * width**2, 2 * model.num_heads * tokens * width
    assert counter.get_total_flops() == pytest.approx(2 * (one_token + all_tokens), rel=1e-3)


def test_softmax_is_taken_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    softmax, taken = Tensor.softmax, []
    monkeypatch.setattr(
        Tensor, "softmax", lambda self, *a, **k: taken.append(softmax(self, *a, **k)) or taken[-1]
    )
    pico().to(torch.bfloat16)(pictures(1, 3, 32, 32).to(torch.bfloat16))
    assert len(taken) == 5 and all(weights.dtype == torch.float32 for weights in taken)


@pytest.mark.slow
def test_compiled_model_gives_the_same_logits_and_gradients() -> None:
    model, images = pico().eval(), pictures(2, 3, 40, 56)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    compiled(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_traced_model_takes_other_batches_and_sizes() -> None:
    model, images = pico().eval(), pictures(2, 3, 40, 56)
    model(images)  # fills the position cache, which the trace must not freeze
    traced = torch.jit.trace(model, images)
    for other in (images, pictures(5, 3, 40, 56), pictures(1, 3, 33, 90)):
        torch.testing.assert_close(traced(other), model(other))


def test_exported_model_takes_other_batches_and_sizes() -> None:
    model, images = pico().eval(), pictures(2, 3, 40, 56)
    dynamic = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (images,), dynamic_shapes={"images": dynamic}).module()
    other = pictures(3, 3, 50, 71)
    torch.testing.assert_close(exported(other), model(other))


def test_drop_path_is_constant_and_only_in_cross_covariance_blocks() -> None:
    model = pico(drop_path_rate=0.25)
    rates = {name: m.drop_prob for name, m in model.named_modules() if hasattr(m, "drop_prob")}
    assert rates == {f"blocks.{index}.drop_path": 0.25 for index in range(3)}


def test_initial_values_are_the_papers() -> None:
    torch.manual_seed(0)
    model = xcit.create_model("xcit_tiny_24_p16", num_classes=1000)
    weight = model.blocks[0].mlp.fc1.weight
    assert 0.0195 < weight.std() < 0.0205
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            assert (parameter == 1e-5).all()
        elif "temperature" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias") and not any(part in name for part in ("conv", "projection")):
            assert (parameter == 0).all(), name
    assert 0.01 < model.cls_token.std() < 0.03
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
