import pytest
import torch
import torch.nn.functional as F

import xcit
from tests.xcit.naive_segmenter import fpn_shapes, random_state, semantic_fpn, upernet, upernet_shapes
from xcit.openmmlab import is_segmenter, load_segmenter, segmenter_kind, segmenter_names
from xcit.segmenter import HEADS, SemanticFPN
from xcit.weights import WeightsError

ARCH, WIDTH, CLASSES = "xcit_pico_3_p8", 96, 4
SHAPES = {"fpn": fpn_shapes, "upernet": upernet_shapes}
NAIVE = {"fpn": semantic_fpn, "upernet": upernet}
SMALL = {"fpn": {"channels": 16}, "upernet": {"channels": 32, "auxiliary_channels": 16}}


def create(head, arch=ARCH):
    return HEADS[head](xcit.create_pyramid(arch), CLASSES, **SMALL[head])


def published(head, arch=ARCH, width=WIDTH, classes=CLASSES, seed=0):
    """What a file of mmsegmentation holds: the backbone under `backbone.`, and the heads."""
    torch.manual_seed(seed)
    pyramid = xcit.create_pyramid(arch)
    backbone = {
        f"backbone.{name.removeprefix('trunk.')}": value.clone()
        for name, value in pyramid.state_dict().items()
    }
    state = backbone | random_state(SHAPES[head](width, classes, **SMALL[head]), seed)
    return {"meta": {"CLASSES": ("a", "b", "c", "d"), "epoch": 1}, "state_dict": state}, pyramid


@pytest.mark.parametrize("head", HEADS)
def test_a_file_of_mmsegmentation_gives_the_logits_of_a_naive_head_on_its_tensors(head, tmp_path):
    content, pyramid = published(head)
    torch.save(content, tmp_path / "published.pth")
    network = create(head).eval()
    report = load_segmenter(network, tmp_path / "published.pth")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        coarse = NAIVE[head](content["state_dict"], pyramid.eval()(images))
        expected = F.interpolate(coarse, size=(64, 96), mode="bilinear", align_corners=False)
        assert torch.allclose(network(images).logits, expected, atol=1e-4)
    assert report.matched == report.total == len(content["state_dict"])
    assert report.missing == report.unexpected == []


@pytest.mark.parametrize("arch", ["xcit_nano_12_p8", "xcit_nano_12_p16"])
def test_both_patch_sizes_have_the_published_names_of_levels(arch):
    content, _ = published("fpn", arch, 128)
    load_segmenter(create("fpn", arch), content)
    levels = {name for name in content["state_dict"] if name.startswith("backbone.fpn")}
    modules = {".".join(name.split(".")[1:3]) for name in levels}
    assert modules == ({"fpn1.0", "fpn1.1", "fpn1.3", "fpn2.0"} if arch.endswith("16") else {"fpn1.0"})


@pytest.mark.parametrize("head", HEADS)
def test_our_own_checkpoint_loads_and_is_told_from_a_backbone(head, tmp_path):
    torch.manual_seed(1)
    network = create(head)
    torch.save({"model": network.state_dict()}, tmp_path / "ours.pth")
    other = create(head)
    load_segmenter(other, tmp_path / "ours.pth")
    assert all(torch.equal(other.state_dict()[name], value) for name, value in network.state_dict().items())
    assert segmenter_kind(network.state_dict()) == (head, CLASSES, ARCH)
    assert is_segmenter(network.state_dict())
    assert not is_segmenter(network.pyramid.state_dict())


@pytest.mark.parametrize("head", HEADS)
def test_a_published_file_tells_its_kind(head):
    state = segmenter_names(published(head)[0]["state_dict"])
    assert segmenter_kind(state) == (head, CLASSES, ARCH)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (
            lambda: create("upernet"),
            "holds a Semantic FPN for 4 classes on xcit_pico_3_p8, and the network is a UPerNet for 4 classes",
        ),
        (
            lambda: SemanticFPN(xcit.create_pyramid(ARCH), 150),
            "for 4 classes .* a Semantic FPN for 150 classes",
        ),
        (
            lambda: create("fpn", "xcit_nano_12_p8"),
            "on xcit_pico_3_p8, and the network is a Semantic FPN for 4 classes on xcit_nano_12_p8",
        ),
        (lambda: xcit.create_pyramid(ARCH), "and the network is no segmentation network"),
    ],
)
def test_a_file_of_another_network_is_refused_and_changes_nothing(network, sentence):
    refused = network()
    before = {name: value.clone() for name, value in refused.state_dict().items()}
    with pytest.raises(WeightsError, match=sentence):
        load_segmenter(refused, published("fpn")[0])
    assert all(torch.equal(refused.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("change", ["missing", "left over", "of another shape"])
def test_less_more_or_other_than_the_network_is_refused(change):
    content, _ = published("fpn")
    state = content["state_dict"]
    name = "decode_head.scale_heads.1.0.bn.weight"
    if change == "missing":
        del state[name]
    elif change == "left over":
        state["decode_head.extra"] = torch.zeros(1)
    else:
        state[name] = torch.zeros(3)
    with pytest.raises(WeightsError, match=change):
        load_segmenter(create("fpn"), content)


def test_a_backbone_is_refused_in_a_sentence(tmp_path):
    torch.save(xcit.create_model(ARCH).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(
        WeightsError, match="holds no segmentation network, and the network is a Semantic FPN"
    ):
        load_segmenter(create("fpn"), tmp_path / "backbone.pth")
