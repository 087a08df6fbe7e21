import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import xcit
from tests.xcit.naive_segmenter import (
    auxiliary,
    fpn_shapes,
    semantic_fpn,
    upernet,
    upernet_shapes,
)
from xcit.segmenter import HEADS, Logits, SemanticFPN, segmentation_losses

CLASSES = 5
MINIATURE = "xcit_pico_3_p8"


def create(head, arch=MINIATURE, **sizes):
    """With all parameters and statistics at random, so that nothing cancels."""
    torch.manual_seed(0)
    network = HEADS[head](xcit.create_pyramid(arch), CLASSES, **sizes)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_(0.2, 0.5)
    return network


def small(head):
    return create(head, channels=16, **({"auxiliary_channels": 8} if head == "upernet" else {}))


def by_published_names(network):
    """The heads' tensors under mmsegmentation's names."""
    return {
        name.replace("neck.inner_blocks", "neck.lateral_convs")
        .replace("neck.layer_blocks", "neck.fpn_convs")
        .replace(".0.weight" if name.startswith("neck") else "\0", ".conv.weight")
        .replace(".0.bias" if name.startswith("neck") else "\0", ".conv.bias"): value
        for name, value in network.state_dict().items()
    }


def trunk_parameters(width, depth, heads, patch_size):
    attention = 3 * width * width + 3 * width + heads + width * width + width
    mlp = 4 * width * width + 4 * width + 4 * width * width + width
    local = 2 * (9 * width + width) + 2 * width
    block = attention + mlp + local + 3 * 2 * width + 3 * width
    widths = [3, *(width // 2**power for power in reversed(range(int(math.log2(patch_size)))))]
    embedding = sum(9 * before * after + 2 * after for before, after in itertools.pairwise(widths))
    return depth * block + embedding + 64 * width + width


def levels_parameters(width, patch_size):
    doubling = 4 * width * width + width
    return 3 * doubling + 2 * width if patch_size == 16 else doubling


def fpn_parameters(width, classes):
    neck = 4 * (width * width + width) + 4 * (9 * width * width + width)
    to_the_head = 4 * (9 * width * 128 + 2 * 128)
    within_the_head = 3 * (9 * 128 * 128 + 2 * 128)  # one more at stride 16, two at stride 32
    return neck + to_the_head + within_the_head + 128 * classes + classes


def upernet_parameters(width, classes):
    pooling = 4 * (width * 512 + 2 * 512) + 9 * (width + 4 * 512) * 512 + 2 * 512
    top_down = 3 * (width * 512 + 2 * 512) + 3 * (9 * 512 * 512 + 2 * 512)
    together = 9 * 4 * 512 * 512 + 2 * 512 + 512 * classes + classes
    return pooling + top_down + together + 9 * width * 256 + 2 * 256 + 256 * classes + classes


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize(
    ("size", "width", "depth", "heads"),
    [("tiny_12", 192, 12, 4), ("small_12", 384, 12, 8), ("small_24", 384, 24, 8), ("medium_24", 512, 24, 8)],
)
@pytest.mark.parametrize(("head", "of_head"), [("fpn", fpn_parameters), ("upernet", upernet_parameters)])
def test_published_models_have_as_many_parameters_as_their_configuration(
    size, width, depth, heads, patch_size, head, of_head
):
    with torch.device("meta"):
        network = HEADS[head](xcit.create_pyramid(f"xcit_{size}_p{patch_size}"), 150)
    expected = trunk_parameters(width, depth, heads, patch_size) + levels_parameters(width, patch_size)
    assert sum(value.numel() for value in network.parameters()) == expected + of_head(width, 150)


@pytest.mark.parametrize(("head", "shapes"), [("fpn", fpn_shapes), ("upernet", upernet_shapes)])
def test_heads_have_the_published_names_and_shapes(head, shapes):
    with torch.device("meta"):
        network = HEADS[head](xcit.create_pyramid("xcit_tiny_12_p16"), 150)
    ours = {
        name: tuple(value.shape)
        for name, value in by_published_names(network).items()
        if not name.startswith("pyramid.") and not name.endswith("num_batches_tracked")
    }
    assert ours == shapes(192, 150)


@pytest.mark.parametrize(("head", "naive"), [("fpn", semantic_fpn), ("upernet", upernet)])
@pytest.mark.parametrize("size", [(32, 96), (192, 160)])
def test_logits_are_those_of_a_naive_head_on_the_same_maps(head, naive, size):
    network = small(head).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = network.pyramid(images)
        coarse = naive(by_published_names(network), maps)
        expected = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        assert torch.allclose(network.coarse(images), coarse, atol=1e-4)
        assert torch.allclose(network(images).logits, expected, atol=1e-4)


def test_auxiliary_logits_are_those_of_a_naive_head_on_the_third_map():
    network = small("upernet").eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = auxiliary(by_published_names(network), network.pyramid(images))
        network.training = True  # the parts stay as they are
        found = network(images).auxiliary
    assert torch.allclose(
        found, F.interpolate(expected, size=(64, 96), mode="bilinear", align_corners=False), atol=1e-4
    )


@pytest.mark.parametrize("head", HEADS)
def test_only_upernet_has_auxiliary_logits_and_only_in_training(head):
    network = small(head)
    images = torch.randn(2, 3, 64, 64)
    assert (network.train()(images).auxiliary is not None) == (head == "upernet")
    assert network.eval()(images).auxiliary is None


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(1, 1), (33, 50), (64, 95)])
def test_images_of_any_size_have_the_logits_of_the_image_padded_with_zeros(head, size):
    network = small(head).eval()
    images = torch.randn(1, 3, *size)
    padded = torch.zeros(1, 3, *(32 * math.ceil(side / 32) for side in size))
    padded[..., : size[0], : size[1]] = images
    with torch.no_grad():
        logits = network(images).logits
        assert logits.shape == (1, CLASSES, *size)
        assert torch.equal(logits, network(padded).logits[..., : size[0], : size[1]])
        assert torch.equal(network.coarse(images), network.coarse(padded))


@pytest.mark.parametrize("arch", [MINIATURE, pytest.param("xcit_nano_12_p16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_every_parameter(head, arch):
    sizes = {"channels": 16} if arch == MINIATURE else {}
    network = create(head, arch, **sizes).train()
    targets = torch.randint(0, CLASSES, (2, 64, 64))
    sum(segmentation_losses(network(torch.randn(2, 3, 64, 64)), targets).values()).backward()
    without = [
        name
        for name, value in network.named_parameters()
        if value.grad is None or not value.grad.abs().sum() > 0
    ]
    assert without == []


def test_loss_is_the_mean_over_judged_pixels():
    logits, targets = torch.randn(2, CLASSES, 6, 7), torch.randint(0, CLASSES, (2, 6, 7))
    targets[0, :3] = 255
    costs = [
        -logits[b, :, y, x].log_softmax(0)[targets[b, y, x]]
        for b in range(2)
        for y in range(6)
        for x in range(7)
        if targets[b, y, x] != 255
    ]
    losses = segmentation_losses(Logits(logits, None), targets)
    assert list(losses) == ["loss_seg"]
    assert losses["loss_seg"].item() == pytest.approx(float(sum(costs) / len(costs)), rel=1e-5)


def test_auxiliary_loss_counts_for_two_fifths():
    logits, targets = torch.randn(2, CLASSES, 6, 7), torch.randint(0, CLASSES, (2, 6, 7))
    losses = segmentation_losses(Logits(logits, logits), targets)
    assert losses["loss_aux"].item() == pytest.approx(0.4 * losses["loss_seg"].item(), rel=1e-6)


def test_logits_of_another_size_are_brought_to_the_targets():
    logits, targets = torch.randn(1, CLASSES, 4, 4), torch.randint(0, CLASSES, (1, 16, 16))
    large = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
    assert segmentation_losses(Logits(logits, None), targets)["loss_seg"].item() == pytest.approx(
        F.cross_entropy(large, targets).item(), rel=1e-6
    )


@pytest.mark.parametrize("ignored", [255, -1])
def test_a_batch_in_which_nothing_is_judged_costs_nothing_and_has_finite_gradients(ignored):
    logits = torch.randn(1, CLASSES, 8, 8, requires_grad=True)
    targets = torch.full((1, 8, 8), ignored)
    loss = segmentation_losses(Logits(logits, None), targets, ignored=ignored)["loss_seg"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        SemanticFPN(xcit.create_pyramid(MINIATURE), 0)
