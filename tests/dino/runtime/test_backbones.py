import re

import pytest
import torch

from dino.runtime.backbones import (
    class_attention,
    create_backbone,
    feature_width,
    has_class_attention,
    list_backbones,
    load_backbone_weights,
    tokens,
)
from dino.runtime.options import UserError

# Of the published file dino_deitsmall16_pretrain.pth.
VIT_BLOCK = {
    *(f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")),
    *(f"attn.{layer}.{part}" for layer in ("qkv", "proj") for part in ("weight", "bias")),
    *(f"mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")),
}
VIT = {
    *(
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    ),
    *(f"blocks.{number}.{name}" for number in range(12) for name in VIT_BLOCK),
}


def images(rows, cols, count=2):
    return torch.randn(count, 3, rows, cols, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [("xcit_small_12_p61", "xcit_small_12_p16"), ("vit_smal", "vit_small"), ("resnet05", "resnet")],
)
def test_an_unknown_name_is_refused_with_the_nearest_ones(arch, nearest):
    with pytest.raises(
        UserError, match=f"^unknown model '{arch}'; did you mean .*{nearest}.*any timm name works too"
    ):
        create_backbone(arch)


def test_the_originals_older_names_are_the_same_networks():
    shapes = [
        {name: value.shape for name, value in create_backbone(arch, 8).state_dict().items()}
        for arch in ("deit_small", "vit_small")
    ]
    assert shapes[0] == shapes[1]


def test_a_name_that_is_like_none_is_refused_with_the_list():
    with pytest.raises(UserError, match=re.escape(f"known: {', '.join(list_backbones())} (any timm name")):
        create_backbone("%%%")


@pytest.mark.parametrize(
    ("arch", "patch_size", "width", "millions"),
    [("vit_tiny", 16, 192, 5.5), ("vit_small", 8, 384, 21.7), ("vit_small", 16, 384, 21.7)],
)
def test_vits_have_the_keys_and_shapes_of_the_published_files(arch, patch_size, width, millions):
    backbone = create_backbone(arch, patch_size)
    state = backbone.state_dict()
    assert set(state) == VIT
    assert state["pos_embed"].shape == (1, 1 + (224 // patch_size) ** 2, width)
    assert state["patch_embed.proj.weight"].shape == (width, 3, patch_size, patch_size)
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert backbone.norm.eps == 1e-6 and backbone.blocks[0].attn.num_heads == width // 64


@pytest.mark.parametrize(
    ("arch", "patches"),
    [
        ("xcit_pico_3_p8", 4 * 6),
        ("vit_tiny", 2 * 3),
        ("deit_tiny_patch16_224", 2 * 3),
        ("resnet10t", 1 * 2),
        ("mobilenetv3_small_050", 1 * 2),
        ("xcit_nano_12_p16_224", 2 * 3),
        ("convnext_atto", 1 * 1),
    ],
)
def test_any_backbone_gives_its_feature_and_its_patch_tokens_for_a_rectangle(arch, patches):
    backbone = create_backbone(arch, drop_path_rate=0.1).eval()
    with torch.no_grad():
        feature, patch_tokens = tokens(backbone, images(32, 48))
        torch.testing.assert_close(feature, backbone(images(32, 48)))
    assert feature.shape == (2, feature_width(backbone))
    assert patch_tokens.shape == (2, patches, backbone.num_features)


def test_patch_tokens_are_the_grid_row_by_row():
    for arch in ("resnet10t", "swin_tiny_patch4_window7_224"):
        side = 224 if arch.startswith("swin") else 64
        backbone = create_backbone(arch).eval()
        with torch.no_grad():
            _, patch_tokens = tokens(backbone, images(side, side, 1))
            grid = backbone.forward_features(images(side, side, 1))
        row_1_col_0 = grid[0, 1, 0] if arch.startswith("swin") else grid[0, :, 1, 0]
        cols = side // 32
        torch.testing.assert_close(patch_tokens[0, cols], row_1_col_0)


def test_networks_without_a_class_token_keep_their_first_patch():
    backbone = create_backbone("mixer_s32_224").eval()
    assert tokens(backbone, images(224, 224, 1))[1].shape == (1, 49, 512)
    assert not has_class_attention(backbone)


@pytest.mark.parametrize("arch", ["xcit_pico_3_p8", "vit_tiny", "deit_tiny_patch16_224", "convnext_atto"])
def test_the_drop_path_rate_reaches_the_backbone(arch):
    modules = create_backbone(arch, drop_path_rate=0.2).modules()
    assert max(getattr(module, "drop_prob", None) or 0 for module in modules) == pytest.approx(0.2)


@pytest.mark.parametrize("block", [0, 5, -1])
def test_a_vits_class_attention_equals_the_softmax_row_inside_it(block):
    backbone = create_backbone("vit_tiny").eval()
    attention = backbone.blocks[block].attn
    attention.fused_attn = False  # then the whole matrix passes through the dropout
    seen = []
    attention.attn_drop.register_forward_hook(lambda _, inputs, output: seen.append(output))
    with torch.no_grad():
        before = backbone(images(48, 80))
        maps = class_attention(backbone, images(48, 80), block)
        assert torch.equal(backbone(images(48, 80)), before)
    assert maps.shape == (2, 3, 3, 5) and maps.dtype == torch.float32
    torch.testing.assert_close(maps.flatten(2), seen[0][:, :, 0, 1:], rtol=0, atol=1e-6)


def test_of_a_vit_nothing_beyond_the_wanted_attention_is_computed():
    backbone = create_backbone("vit_tiny").eval()
    called = []
    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    with torch.no_grad():
        class_attention(backbone, images(32, 32), block=3)
    assert called == [0, 1, 2]
    backbone(images(32, 32))
    assert called == [0, 1, 2, *range(12)], "a hook was left behind"


@pytest.mark.parametrize(("arch", "grid"), [("xcit_pico_3_p8", (3, 8)), ("vit_tiny", (2, 4))])
def test_class_attention_has_the_rows_and_columns_of_the_picture(arch, grid):
    side = 8 if arch.startswith("xcit") else 16
    with torch.no_grad():
        maps = class_attention(create_backbone(arch).eval(), images(grid[0] * side, grid[1] * side))
    assert maps.shape[-2:] == grid and (maps > 0).all() and (maps.sum(dim=(2, 3)) < 1).all()


def test_a_network_without_class_attention_is_refused():
    with pytest.raises(
        UserError,
        match=r"^there is no class attention to draw in ResNet: --arch takes XCiT's names, .* vit_small",
    ):
        class_attention(create_backbone("resnet10t"), images(32, 32))


def test_weights_that_do_not_fit_are_a_users_error(tmp_path):
    torch.save(create_backbone("vit_tiny").state_dict(), tmp_path / "vit.pth")
    assert load_backbone_weights(create_backbone("vit_tiny"), tmp_path / "vit.pth").missing == []
    with pytest.raises(UserError, match="does not fit"):
        load_backbone_weights(create_backbone("xcit_pico_3_p8"), tmp_path / "vit.pth")
