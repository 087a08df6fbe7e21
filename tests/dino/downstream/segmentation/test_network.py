import pytest
import torch

import xcit
from dino.downstream.segmentation.network import create_segmenter, open_weights
from dino.downstream.segmentation.options import SegmentOptions, chosen_scale, published_drop_path
from dino.downstream.segmentation.rates import create_optimizer, create_scheduler
from xcit.segmenter import HEADS

ARCH = "xcit_pico_3_p8"


def test_weights_of_a_backbone_fill_the_trunk(tmp_path):
    model = xcit.create_model(ARCH)
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "dino.pth"
    )
    weights = open_weights(str(tmp_path / "dino.pth"))
    assert (weights.arch, weights.head, weights.classes) == (ARCH, None, None)
    named = create_segmenter(weights, 3)
    trunk = named.network.pyramid.trunk.state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in trunk.items())
    assert "tensors loaded" in str(named)


def test_a_file_of_mmsegmentation_brings_its_names(tmp_path):
    network = HEADS["fpn"](xcit.create_pyramid(ARCH), 150)
    state = {
        name.replace("pyramid.trunk", "backbone").replace("pyramid", "backbone"): value
        for name, value in network.state_dict().items()
    }
    names = tuple(f"thing {number}" for number in range(150))
    torch.save({"meta": {"CLASSES": names}, "state_dict": state}, tmp_path / "mm.pth")
    weights = open_weights(str(tmp_path / "mm.pth"))
    assert (weights.arch, weights.head, weights.certain) == (ARCH, "fpn", False)
    assert weights.classes.names == names
    assert weights.classes.ids == tuple(range(1, 151))  # of ADE20k


def test_rates_are_those_of_the_published_models():
    defaults = SegmentOptions()
    network = HEADS["fpn"](xcit.create_pyramid(ARCH), 3, channels=16)
    optimizer = create_optimizer(defaults, network)
    decayed, others = optimizer.param_groups
    names = {id(value): name for name, value in network.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    assert {names[id(value)].split(".")[-2] for value in others["params"]} == {"norm1", "norm2", "norm3"}
    assert any(names[id(value)].endswith("bn.weight") for value in decayed["params"])
    scheduler = create_scheduler(defaults, optimizer)
    found = []
    for step in (0, 750, 40_000, 60_000, 80_000):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([6e-11, 3e-5, 3e-5, 1.5e-5, 0], rel=1e-4)


@pytest.mark.parametrize(
    ("arch", "head", "rate"),
    [
        ("xcit_tiny_12_p16", "fpn", 0.0),
        ("xcit_small_12_p8", "upernet", 0.05),
        ("xcit_small_24_p16", "fpn", 0.1),
        ("xcit_medium_24_p8", "fpn", 0.2),
        ("xcit_medium_24_p16", "upernet", 0.15),
        ("xcit_nano_12_p8", "fpn", 0.0),
    ],
)
def test_stochastic_depth_is_the_published_one(arch, head, rate):
    assert published_drop_path(arch, head) == rate
    trunk = create_segmenter(open_weights(""), 2, arch=ARCH, drop_path=0.3).network.pyramid.trunk
    assert {block.drop_path.drop_prob for block in trunk.blocks} == {0.3}


def test_the_scale_is_the_options_then_the_weights_then_the_published_one():
    assert chosen_scale((), None) == (2048, 512)
    assert chosen_scale((), (240, 180)) == (240, 180)
    assert chosen_scale((300, 400), (240, 180)) == (400, 300)
    assert chosen_scale((0,), (240, 180)) is None
    assert chosen_scale((), (0,)) is None


@pytest.mark.parametrize("head", ["fpn", pytest.param("upernet", marks=pytest.mark.slow)])
def test_weights_for_other_classes_keep_all_but_the_last_layer(head, tmp_path):
    network = HEADS[head](xcit.create_pyramid(ARCH), 7)
    torch.save({"model": network.state_dict()}, tmp_path / "seven.pth")
    named = create_segmenter(open_weights(str(tmp_path / "seven.pth")), 3)
    found = named.network.state_dict()
    same = {name for name, value in network.state_dict().items() if torch.equal(value, found[name])}
    assert all("conv_seg" in name for name in found.keys() - same)
    assert found["decode_head.conv_seg.weight"].shape[0] == named.network.num_classes == 3
    assert "last layer is new" in str(named)
