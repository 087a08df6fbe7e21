import pytest
import torch
import torch.nn.functional as F

import xcit
from tests.xcit.test_model import randomised
from xcit.zoo import ARCHITECTURES, create_pyramid

# Parameters of the whole backbones without a head, from the authors' table.
WITHOUT_HEAD = {
    "xcit_nano_12_p16": 2_924_224,
    "xcit_tiny_24_p8": 11_914_128,
    "xcit_small_12_p16": 25_868_304,
    "xcit_small_12_p8": 25_828_032,
    "xcit_medium_24_p16": 83_882_752,
    "xcit_large_24_p8": 188_163_648,
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", WITHOUT_HEAD)
def test_parameters_are_those_of_the_published_configuration(name):
    width, patch_size = ARCHITECTURES[name].embed_dim, ARCHITECTURES[name].patch_size
    with torch.device("meta"):
        pyramid = create_pyramid(name)
    # A class-attention block: two norms and two scales, queries to values, projection, MLP of four times the width.
    of_class_block = 6 * width + (3 * width**2 + 3 * width) + (width**2 + width) + (8 * width**2 + 5 * width)
    trunk = (
        WITHOUT_HEAD[name] - 2 * of_class_block - 2 * width - width
    )  # nor the last norm and the class token
    assert count(pyramid.trunk) == trunk
    of_transposed = 4 * width**2 + width
    levels = 3 * of_transposed + 2 * width if patch_size == 16 else of_transposed
    assert count(pyramid) == trunk + levels


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("xcit_nano_12_p8", [3, 5, 7, 11]),
        ("xcit_tiny_24_p16", [7, 11, 15, 23]),
        ("xcit_pico_3_p8", [0, 1, 1, 2]),
    ],
)
def test_levels_are_taken_after_the_published_blocks(name, blocks):
    with torch.device("meta"):
        assert create_pyramid(name).blocks == blocks


@pytest.mark.parametrize("name", ["xcit_nano_12_p8", "xcit_nano_12_p16", "xcit_pico_3_p8"])
@pytest.mark.parametrize("size", [(64, 96), (32, 32)])
def test_strides_are_4_8_16_and_32_for_both_patch_sizes(name, size):
    pyramid = create_pyramid(name).eval()
    with torch.no_grad():
        maps = pyramid(torch.randn(2, 3, *size))
    assert [tuple(level.shape) for level in maps] == [
        (2, pyramid.channels, size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)
    ]


@pytest.mark.parametrize("patch_size", [8, 16])
def test_levels_are_made_from_the_tokens_as_the_paper_says(patch_size):
    pyramid = randomised(create_pyramid(f"xcit_nano_12_p{patch_size}")).eval()
    state = pyramid.state_dict()

    def up(maps, name):
        return F.conv_transpose2d(maps, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = pyramid.trunk.feature_maps(images, [3, 5, 7, 11])
        if patch_size == 16:
            normed = F.batch_norm(
                up(tokens[0], "fpn1.0"),
                *(state[f"fpn1.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")),
            )
            expected = [
                up(F.gelu(normed), "fpn1.3"),
                up(tokens[1], "fpn2.0"),
                tokens[2],
                F.max_pool2d(tokens[3], 2),
            ]
        else:
            pooled = [F.max_pool2d(tokens[2], 2), F.max_pool2d(tokens[3], 4)]
            expected = [up(tokens[0], "fpn1.0"), tokens[1], *pooled]
        for found, wanted in zip(pyramid(images), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_gradients_reach_every_parameter():
    pyramid = randomised(create_pyramid("xcit_nano_12_p16"))
    sum(level.square().mean() for level in pyramid(torch.randn(2, 3, 64, 32))).backward()
    assert [name for name, parameter in pyramid.named_parameters() if parameter.grad is None] == []
    assert all(
        parameter.grad.any() for name, parameter in pyramid.named_parameters() if name.startswith("fpn")
    )


def test_images_without_room_for_the_coarsest_level_are_refused():
    with pytest.raises(ValueError, match=r"32 pixels or more on a side, got \(1, 3, 64, 31\)"):
        create_pyramid("xcit_pico_3_p8")(torch.zeros(1, 3, 64, 31))


def test_checkpointing_and_drop_path_are_the_trunks():
    torch.manual_seed(0)
    pyramid = xcit.create_pyramid("xcit_pico_3_p8", drop_path_rate=0.3)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    plain = pyramid(images)[0]
    pyramid.trunk.set_grad_checkpointing()
    torch.manual_seed(1)
    again = pyramid(images)[0]
    assert torch.allclose(plain, again, atol=1e-6)
    assert not torch.equal(pyramid(images)[0], again)
