"""Maps for pictures of any size, against the backbone's own class attention on hand-made input."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize as torchvision_resize

from dino.attention.maps import attention_maps, head_count, patch_side, resize
from dino.runtime.backbones import class_attention
from dino.runtime.options import UserError
from xcit import XCiT


def tiny_xcit() -> XCiT:
    torch.manual_seed(0)
    return XCiT(patch_size=8, embed_dim=16, depth=1, num_heads=4, eta=1.0)


def tiny_vit(**options: bool) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=0, **options
    )


def pixels(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, cols, 3), dtype=np.uint8)


def as_network_input(image: np.ndarray) -> Tensor:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = (image / 255 - mean) / std
    return torch.from_numpy(normalized.transpose(2, 0, 1).copy()).float()[None]


@pytest.mark.parametrize("block", [-1, 0])
def test_maps_are_the_class_attention_of_the_normalised_picture(block: int):
    backbone, image = tiny_xcit().eval(), pixels(24, 40)
    expected = class_attention(backbone, as_network_input(image), block=block)[0]
    maps = attention_maps(backbone, image[None], block=block)[0]
    assert maps.dtype == np.float32 and maps.shape == (4, 3, 5)
    np.testing.assert_allclose(maps, expected.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(9,), (30,), (50,), (16, 40)])
@pytest.mark.parametrize(("rows", "cols"), [(37, 52), (52, 37), (40, 40), (1, 7)])
def test_resizing_is_torchvisions(size: tuple[int, ...], rows: int, cols: int):
    image = Image.fromarray(pixels(rows, cols))
    expected = torchvision_resize(image, list(size), InterpolationMode.BICUBIC)
    asked = (size[0], size[1]) if len(size) == 2 else size[0]
    np.testing.assert_array_equal(resize(image, asked), np.asarray(expected))


@pytest.mark.parametrize("make", [tiny_xcit, lambda: tiny_vit(dynamic_img_size=True)])
@pytest.mark.parametrize("size", [(37, 61), (8, 8), (5, 3), (16, 50)])
def test_the_grid_covers_the_whole_picture(make, size: tuple[int, int]):
    backbone = make()
    (maps,) = attention_maps(backbone, pixels(*size)[None])
    assert maps.shape[1:] == (-(-size[0] // 8), -(-size[1] // 8)) and patch_side(backbone) == 8
    assert np.isfinite(maps).all() and (maps.sum(axis=(1, 2)) <= 1 + 1e-5).all()


def test_a_vits_last_patches_are_filled_with_the_pictures_edge():
    backbone, image = tiny_vit(dynamic_img_size=True).eval(), pixels(37, 61)
    filled = np.pad(image, ((0, 3), (0, 3), (0, 0)), mode="edge")
    expected = class_attention(backbone, as_network_input(filled))[0].detach().numpy()
    np.testing.assert_allclose(attention_maps(backbone, image[None])[0], expected, atol=1e-6)


def test_the_backbone_is_left_as_it_was_found():
    backbone = tiny_xcit().train()
    backbone.norm.eval()
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    image = pixels(24, 40)
    maps = attention_maps(backbone, image[None])
    assert backbone.training and not backbone.norm.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    np.testing.assert_array_equal(maps, attention_maps(backbone.eval(), image[None]))
    backbone.train()(as_network_input(image).repeat(2, 1, 1, 1)).sum().backward()


def test_bfloat16_gives_nearly_the_same_maps_in_float32():
    backbone, image = tiny_xcit(), pixels(32, 32)
    half = attention_maps(backbone, image[None], precision="bf16")
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, attention_maps(backbone, image[None]), rtol=0.1)


def test_image_size_is_the_short_side_or_rows_and_columns():
    image = Image.fromarray(pixels(20, 30))
    assert resize(image, None).shape == (20, 30, 3)
    assert resize(np.asarray(image), 40).shape == (40, 60, 3)
    expected = np.asarray(image.resize((17, 9), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(image, (9, 17)), expected)


class NoAttention(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


def test_a_model_without_class_attention_is_refused():
    with pytest.raises(UserError, match="no class attention to draw in NoAttention: --arch takes XCiT's"):
        attention_maps(NoAttention(), pixels(16, 16)[None])
    for arch, name in (("resnet18", "ResNet"), ("vit_small_patch16_18x2_224", "VisionTransformer")):
        with pytest.raises(UserError, match=f"no class attention to draw in {name}: "):
            patch_side(timm.create_model(arch, num_classes=0))


def test_a_vit_with_a_convolutional_stem_has_the_patches_of_both():
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=0, dynamic_img_size=True)
    assert patch_side(hybrid) == 8 * 4
    assert attention_maps(hybrid, pixels(70, 130)[None]).shape == (1, 3, 3, 5)


@pytest.mark.parametrize("make", [tiny_xcit, lambda: tiny_vit(dynamic_img_size=True)])
def test_the_head_count_is_that_of_the_maps(make):
    assert head_count(make(), block=0) == attention_maps(make(), pixels(16, 16)[None], block=0).shape[1]


def test_a_vit_of_one_size_says_which():
    with pytest.raises(
        UserError, match="takes pictures of 32 x 32 pixels only, got 40 x 32; add --image_size 32 32"
    ):
        attention_maps(tiny_vit(), pixels(40, 32)[None])
    assert attention_maps(tiny_vit(), pixels(32, 32)[None]).shape == (1, 3, 4, 4)


def test_a_batch_gives_each_pictures_own_maps():
    backbone = tiny_xcit()
    images = np.random.default_rng(1).integers(0, 256, (3, 24, 40, 3), dtype=np.uint8)
    maps = attention_maps(backbone, images)
    assert maps.shape == (3, 4, 3, 5)
    for image, of_one in zip(images, maps, strict=True):
        np.testing.assert_allclose(attention_maps(backbone, image[None])[0], of_one, atol=1e-6)


@pytest.mark.parametrize("tile", [8, 64, 104])
def test_tiles_change_nothing_where_patches_see_their_neighbours_only(tile: int):
    backbone = tiny_xcit()
    for block in backbone.blocks:
        torch.nn.init.zeros_(block.gamma1)  # no cross-covariance attention: the rest is local
    for block in backbone.cls_attn_blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)  # or all patches would weigh nearly the same
    image = pixels(203, 165)[None]
    whole = attention_maps(backbone, image)
    assert whole.std() > 1e-3
    np.testing.assert_allclose(attention_maps(backbone, image, tile=tile), whole, rtol=1e-4, atol=1e-7)


def test_a_picture_within_one_tile_is_not_cut():
    backbone, image = tiny_xcit(), pixels(64, 240)[None]
    whole = attention_maps(backbone, image)
    np.testing.assert_array_equal(attention_maps(backbone, image, tile=240), whole)
    assert (attention_maps(backbone, image, tile=80) != whole).any()


def test_tiles_and_blocks_that_cannot_be_are_refused():
    image = pixels(64, 64)[None]
    with pytest.raises(UserError, match="--tile 7: a tile holds at least one patch of 8 pixels"):
        attention_maps(tiny_xcit(), image, tile=7)
    with pytest.raises(UserError, match="--tile is for XCiT"):
        attention_maps(tiny_vit(dynamic_img_size=True), image, tile=32)
    with pytest.raises(UserError, match=r"--block 2: this model has 2 blocks .* 0 to 1; -1 is the last"):
        attention_maps(tiny_xcit(), image, block=2)
    with pytest.raises(UserError, match="--block -3"):
        attention_maps(tiny_vit(dynamic_img_size=True), image, block=-3)
