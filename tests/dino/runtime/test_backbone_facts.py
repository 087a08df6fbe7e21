"""What is asked of a backbone beside its features: its last blocks, and the checksum of its weights."""

import hashlib

import pytest
import torch
from torch import nn

from dino.runtime.backbones import (
    create_backbone,
    last_blocks,
    reads_blocks,
    tensors_sha256,
    tokens,
)
from dino.runtime.options import UserError


def images(side):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def shaken(arch, patch_size=16):
    """As after training: fresh norms and scales would hide one that is left out."""
    torch.manual_seed(0)
    backbone = create_backbone(arch, patch_size).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


# Last blocks


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize(("arch", "side"), [("vit_tiny", 48), ("vit_small_patch14_reg4_dinov2", 28)])
def test_last_blocks_equal_what_hooks_see_after_the_norm(arch, side, count):
    backbone = shaken(arch)
    seen = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        feature, patches = tokens(backbone, images(side))
        expected = [backbone.norm(output) for output in seen[-count:]]
        found = last_blocks(backbone, images(side), count)
    assert len(found) == count
    for (class_token, patch_tokens), output in zip(found, expected, strict=True):
        torch.testing.assert_close(class_token, output[:, 0])
        torch.testing.assert_close(patch_tokens, output[:, backbone.num_prefix_tokens :])
    torch.testing.assert_close(found[-1], (feature, patches))


def test_blocks_that_a_network_does_not_have_are_refused():
    vit = create_backbone("vit_tiny")
    for count in (0, 13):
        with pytest.raises(UserError, match=rf"^the last {count} blocks are asked for, the ViT has 12$"):
            last_blocks(vit, images(32), count)
    with pytest.raises(UserError, match=r"^XCiT has no class token after each block; only ViTs have$"):
        last_blocks(create_backbone("xcit_pico_3_p8"), images(32), 1)


@pytest.mark.parametrize(
    ("arch", "reads"),
    [
        ("vit_tiny", True),
        ("vit_tiny_patch16_224", True),
        ("vit_wee_patch16_reg1_gap_256", False),
        ("deit_tiny_distilled_patch16_224", False),
        ("xcit_nano_12_p16_224", False),
        ("convnext_atto", False),
    ],
)
def test_blocks_are_read_where_the_feature_is_the_class_token_of_the_last(arch, reads):
    assert reads_blocks(create_backbone(arch)) is reads


# Checksum


class Bag(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors_of_every_kind_and_shape_are_part_of_the_checksum(dtype, shape):
    zeros = torch.zeros(shape, dtype=dtype)
    assert tensors_sha256(Bag(a=zeros)) == tensors_sha256(Bag(a=zeros.clone()))
    if zeros.numel():
        changed = zeros.clone()
        changed.view(-1)[-1] = 1
        assert tensors_sha256(Bag(a=changed)) != tensors_sha256(Bag(a=zeros))
    assert tensors_sha256(Bag(b=zeros)) != tensors_sha256(Bag(a=zeros))


def test_shapes_and_dtypes_are_part_of_the_checksum_and_strides_are_not():
    rows = torch.arange(6.0)
    sums = {
        tensors_sha256(Bag(a=tensor))
        for tensor in (rows, rows.view(2, 3), rows.view(3, 2), rows.int(), rows.view(torch.int32))
    }
    assert len(sums) == 5
    turned = rows.view(2, 3).t().contiguous().t()
    assert not turned.is_contiguous() and tensors_sha256(Bag(a=turned)) == tensors_sha256(
        Bag(a=rows.view(2, 3))
    )


def test_the_checksum_is_that_of_names_shapes_and_bytes_in_order():
    bag = Bag(a=torch.tensor([1.0, 2.0]), n=torch.tensor(3))
    expected = hashlib.sha256()
    expected.update(b"a torch.float32 (2,)" + bytes.fromhex("0000803f 00000040"))
    expected.update(b"n torch.int64 ()" + (3).to_bytes(8, "little"))
    assert tensors_sha256(bag) == expected.hexdigest()


def test_one_changed_element_mode_and_gradients():
    backbone = create_backbone("xcit_pico_3_p8")
    before = tensors_sha256(backbone)
    backbone.eval().requires_grad_(False)
    assert tensors_sha256(backbone) == before
    with torch.no_grad():
        backbone.norm.bias[-1] = torch.nextafter(backbone.norm.bias[-1], torch.tensor(1.0))
    assert tensors_sha256(backbone) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_is_no_part_of_the_checksum():
    backbone = create_backbone("xcit_pico_3_p8")
    assert tensors_sha256(backbone) == tensors_sha256(backbone.cuda())
