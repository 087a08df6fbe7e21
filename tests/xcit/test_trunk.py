import pytest
import timm
import torch

import xcit
from tests.xcit.test_model import randomised
from xcit.trunk import Trunk
from xcit.weights import WeightsError, architecture_of, load_weights, read_state_dict
from xcit.zoo import ARCHITECTURES, create_pyramid


@pytest.fixture(scope="module")
def theirs():
    return randomised(timm.create_model("xcit_nano_12_p16_224", num_classes=0)).eval()


@pytest.fixture(scope="module")
def trunk(theirs):
    trunk = create_pyramid("xcit_nano_12_p16").trunk.eval()
    load_weights(trunk, theirs.state_dict())
    return trunk


@pytest.mark.parametrize("size", [(64, 96), (37, 50), (16, 16)])
def test_feature_maps_are_those_of_timm(theirs, trunk, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    blocks = [0, 3, 11]
    with torch.no_grad():
        # timm refuses images that are no whole patches where it reshapes the maps, but not where it computes them.
        expected = theirs.forward_intermediates(
            images, indices=blocks, intermediates_only=True, output_fmt="NLC"
        )
        found = trunk.feature_maps(images, blocks)
    for one, other in zip(found, expected, strict=True):
        rows, cols = (-(-side // 16) for side in size)
        assert one.shape == (2, 128, rows, cols)
        assert torch.allclose(one.flatten(2).transpose(1, 2), other, atol=1e-4 * float(other.abs().max()))


def test_a_trunk_ends_where_xcit_goes_on(trunk):
    model = xcit.create_model("xcit_nano_12_p16").eval()
    model.load_state_dict(trunk.state_dict(), strict=False)
    images = torch.randn(1, 3, 48, 32)
    with torch.no_grad():
        assert torch.equal(trunk(images), model.forward_patches(images))
        assert torch.equal(trunk.feature_maps(images, [11])[0].permute(0, 2, 3, 1), trunk(images))


def test_maps_come_in_the_order_that_they_are_asked_for(trunk):
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        late, early, again = trunk.feature_maps(images, [5, 2, 5])
        assert torch.equal(late, again) and not torch.equal(late, early)
        assert torch.equal(early, trunk.feature_maps(images, [2])[0])


@pytest.mark.parametrize("blocks", [[], [-1], [3, 12]])
def test_a_block_that_is_not_there_is_refused(trunk, blocks):
    with pytest.raises(IndexError, match="blocks are numbered from 0 to 11"):
        trunk.feature_maps(torch.zeros(1, 3, 32, 32), blocks)


def test_blocks_after_the_last_that_is_asked_for_are_not_computed(trunk):
    seen = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
        for number, block in enumerate(trunk.blocks)
    ]
    with torch.no_grad():
        trunk.feature_maps(torch.zeros(1, 3, 32, 32), [1, 4])
    for hook in hooks:
        hook.remove()
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("wrapped", [{}, {"head.weight": torch.zeros(7, 96), "head.bias": torch.zeros(7)}])
def test_a_trunk_takes_a_whole_backbones_weights_and_leaves_the_rest(wrapped):
    model = xcit.create_model("xcit_pico_3_p8")
    trunk = create_pyramid("xcit_pico_3_p8").trunk
    report = load_weights(trunk, {**model.state_dict(), **wrapped})
    assert report.matched == report.total == len(trunk.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trunk.state_dict().items())
    left = {name.split(".")[0] for name in report.unexpected}
    assert left == {"cls_token", "cls_attn_blocks", "norm", *(["head"] if wrapped else [])}


def test_a_backbone_of_another_size_is_refused_for_a_trunk():
    state = xcit.create_model("xcit_nano_12_p16").state_dict()
    with pytest.raises(
        WeightsError, match="an XCiT of width 128, depth 12 and patch size 16, the model is an XCiT of"
    ):
        load_weights(create_pyramid("xcit_pico_3_p8").trunk, state)


def test_what_a_trunk_lacks_is_not_taken_for_the_tail_of_a_whole_model():
    state = xcit.create_model("xcit_pico_3_p8").state_dict()
    with pytest.raises(WeightsError, match="1 left over"):
        load_weights(create_pyramid("xcit_pico_3_p8").trunk, {**state, "more": torch.zeros(1)})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_model_is_known_by_the_shapes_of_its_tensors(name):
    with torch.device("meta"):
        state = xcit.create_model(name).state_dict()
    assert architecture_of(state) == name
    assert architecture_of({f"module.backbone.{key}": value for key, value in state.items()}) is None
    wrapped = {"model": {f"module.backbone.{key}": value for key, value in state.items()}}
    assert architecture_of(read_state_dict(wrapped)) == name


def test_timms_names_give_a_model_away_too_and_others_do_not(theirs):
    assert architecture_of(theirs.state_dict()) == "xcit_nano_12_p16"
    assert architecture_of(timm.create_model("resnet18").state_dict()) is None
    assert (
        architecture_of({"patch_embed.proj.0.0.weight": torch.tensor(1.0), "blocks.0.x": torch.ones(1)})
        is None
    )


def test_linear_layers_of_a_trunk_begin_as_xcits_do():
    trunk = create_pyramid("xcit_nano_12_p16").trunk
    for block in trunk.blocks:
        assert abs(float(block.mlp.fc1.weight.detach().std()) - 0.02) < 1e-3
        assert not block.mlp.fc1.bias.any()


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="got 96 and 5"):
        Trunk(patch_size=8, embed_dim=96, depth=1, num_heads=5, eta=1.0)
