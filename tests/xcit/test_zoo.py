"""Tables of architectures and published weights."""

from pathlib import Path

import pytest
import torch
from timm.models.xcit import default_cfgs

import xcit
from xcit.zoo import ARCHITECTURES, DINO, MINIATURES, PUBLISHED, SUPERVISED


def test_the_papers_models_are_listed_and_miniatures_on_request() -> None:
    models = xcit.list_models()
    assert len(models) == 14
    assert "xcit_nano_12_p16" in models
    assert xcit.list_models(all=True) == [*models, "xcit_pico_3_p8"]


def test_supervised_files_are_those_that_timm_knows() -> None:
    theirs = {
        config.url: config.input_size[1] for entry in default_cfgs.values() for config in entry.cfgs.values()
    }
    ours = {published.url: published.input_size for published in SUPERVISED.values()}
    assert ours == theirs
    assert len(ours) == 42


def test_accuracies_agree_with_timms_and_rise_with_distillation_and_size() -> None:
    for published in SUPERVISED.values():
        assert published.top1 == pytest.approx(published.timm_top1, abs=0.12)
    for architecture in ARCHITECTURES:
        plain, distilled, large = (
            SUPERVISED[f"{architecture}_{kind}"] for kind in ("224", "224_dist", "384_dist")
        )
        assert (plain.distilled, distilled.distilled, large.distilled) == (False, True, True)
        assert plain.top1 < distilled.top1 < large.top1


def test_dino_files_of_xcits_and_vits() -> None:
    assert len([name for name in DINO if name.startswith("dino_xcit")]) == 4
    assert len([name for name in DINO if name.startswith("dino_vit")]) == 4
    assert DINO["dino_vit_small_8"].url == (
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
    )
    assert all(published.knn < published.linear for published in DINO.values())


def test_every_published_file_belongs_to_a_known_architecture() -> None:
    known = {*ARCHITECTURES, "vit_small", "vit_base"}
    assert {published.architecture for published in PUBLISHED.values()} <= known
    assert all(name == published.name for name, published in PUBLISHED.items())
    assert not MINIATURES.keys() & PUBLISHED.keys()


def test_an_unknown_model_gets_the_nearest_names() -> None:
    message = r"^unknown model 'xcit_smal_12_p16'; did you mean xcit_small_12_p16, "
    with pytest.raises(ValueError, match=message):
        xcit.create_model("xcit_smal_12_p16")
    with pytest.raises(ValueError, match=r"^unknown model '!'; known: xcit_nano_12_p16, "):
        xcit.create_model("!")


def test_a_model_is_created_with_weights(tmp_path: Path) -> None:
    model = xcit.create_model("xcit_pico_3_p8", num_classes=3)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    again = xcit.create_model("xcit_pico_3_p8", num_classes=3, weights=tmp_path / "weights.pth")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(images), model.eval()(images))
