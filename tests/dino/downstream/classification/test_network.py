import pytest
import timm
import torch

import xcit
from dino.downstream.classification.network import (
    create_classifier,
    create_teacher,
    hold_patch_embedding,
    names_of_outputs,
    outputs_in,
    pick_architecture,
)
from dino.runtime.options import UserError
from tests.xcit.test_model import randomised

PICO = "xcit_pico_3_p8"


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """A file of XCiT's layout with a head of 7 classes, and the model that it is of."""
    torch.manual_seed(0)
    model = randomised(xcit.create_model(PICO, num_classes=7)).eval()
    file = tmp_path_factory.mktemp("weights") / "supervised.pth"
    torch.save({"model": model.state_dict()}, file)
    return str(file), model


@pytest.fixture(scope="module")
def self_supervised(tmp_path_factory):
    """A full DINO checkpoint with a head of prototypes."""
    torch.manual_seed(1)
    model = randomised(xcit.create_model(PICO)).eval()
    named = {f"module.backbone.{name}": value for name, value in model.state_dict().items()}
    named["module.head.last_layer.weight_v"] = torch.zeros(4, 3)
    file = tmp_path_factory.mktemp("weights") / "dino.pth"
    torch.save({"teacher": named, "student": named, "args": {"arch": PICO, "patch_size": 8}}, file)
    return str(file), model


IMAGES = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(2))


def same(one, other):
    with torch.no_grad():
        return torch.allclose(one.eval()(IMAGES), other.eval()(IMAGES), atol=1e-6)


def test_weights_with_as_many_classes_keep_their_head(supervised):
    for wanted in (7, None):
        found = create_classifier(PICO, wanted, weights=supervised[0])
        assert same(found.network, supervised[1]) and found.has_head
        assert "with its head of 7 classes" in found.note


def test_a_head_for_other_classes_is_replaced_and_the_rest_kept(supervised):
    found = create_classifier(PICO, 3, weights=supervised[0])
    assert outputs_in(found.network) == 3 and not found.has_head and "with a fresh head" in found.note
    found.network.reset_classifier(0)
    supervised[1].eval()
    with torch.no_grad():
        expected = supervised[1].forward_head(supervised[1].forward_features(IMAGES), pre_logits=True)
        assert torch.allclose(found.network.eval()(IMAGES), expected, atol=1e-6)


def test_dino_weights_go_in_which_the_original_refuses(self_supervised):
    found = create_classifier(PICO, 3, weights=self_supervised[0])
    found.network.reset_classifier(0)
    assert same(found.network, self_supervised[1])


def test_timms_names_go_in_with_their_head(tmp_path):
    theirs = timm.create_model("xcit_nano_12_p16_224", num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    found = create_classifier("xcit_nano_12_p16", 5, weights=str(tmp_path / "timm.pth"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert found.has_head and torch.allclose(found.network.eval()(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny", "regnetx_002", "efficientnet_b0"])
def test_any_backbone_becomes_a_classifier_whatever_it_calls_its_head(arch, tmp_path):
    first = create_classifier(arch, 4, input_size=64)
    torch.save({"model": first.network.state_dict(), "classes": list("abcd")}, tmp_path / "run.pth")
    again = create_classifier(arch, None, input_size=64, weights=str(tmp_path / "run.pth"))
    assert again.has_head and again.classes == ("a", "b", "c", "d") and outputs_in(again.network) == 4
    state = first.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.network.state_dict().items())


def test_weights_without_a_head_cannot_be_evaluated(self_supervised):
    with pytest.raises(UserError, match="has no classification head to evaluate: train one first"):
        create_classifier(PICO, None, weights=self_supervised[0])


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    one = create_classifier(PICO, 3)
    torch.manual_seed(5)
    assert same(one.network, create_classifier(PICO, 3).network)


def test_auto_is_what_the_weights_are(supervised, self_supervised, tmp_path):
    assert pick_architecture("auto", 16, "") == ("xcit_small_12_p16", 16)
    assert pick_architecture("auto", 16, supervised[0])[0] == PICO  # by its shapes
    assert pick_architecture("auto", 16, self_supervised[0]) == (PICO, 8)  # by its options
    assert pick_architecture("xcit_nano_12_p8", 16, supervised[0])[0] == "xcit_nano_12_p8"
    assert pick_architecture("auto", 16, "dino_xcit_medium_24_p8")[0] == "xcit_medium_24_p8"
    torch.save({"model": {"a": torch.zeros(1)}, "args": {"model": "resnet10t"}}, tmp_path / "run.pth")
    assert pick_architecture("auto", 16, str(tmp_path / "run.pth"))[0] == "resnet10t"
    torch.save({"a": torch.zeros(1), "args": None}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="does not say what it is for: name its architecture with --model"):
        pick_architecture("auto", 16, str(tmp_path / "plain.pth"))
    with pytest.raises(UserError, match="there is no file"):
        pick_architecture("auto", 16, str(tmp_path / "nowhere.pth"))


def test_surgery_fills_the_patch_embedding_and_holds_it_still(supervised, tmp_path):
    network = create_classifier(PICO, 3).network
    line = hold_patch_embedding(network, supervised[0])
    assert "held still" in line
    for name, value in supervised[1].patch_embed.state_dict().items():
        assert torch.equal(network.patch_embed.state_dict()[name], value)
    still = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert still == {name for name, _ in network.named_parameters() if name.startswith("patch_embed.")}
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="there is no patch embedding in it"):
        hold_patch_embedding(network, str(tmp_path / "plain.pth"))


def test_a_teacher_knows_the_classes_and_learns_nothing(supervised, self_supervised):
    teacher = create_teacher(PICO, supervised[0], 7)
    assert same(teacher, supervised[1])
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(UserError, match="has no head for 5 classes to teach with"):
        create_teacher(PICO, supervised[0], 5)
    with pytest.raises(UserError, match="timm's weights cannot be had"):
        create_teacher("no_such_model", "", 7)


def test_outputs_beyond_the_names_are_numbered():
    assert names_of_outputs(["a", "b"], 4) == ["a", "b", "2", "3"]
    assert names_of_outputs(["a", "b"], 1) == ["a"]
