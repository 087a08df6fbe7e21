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
    resnet = DINO["dino_resnet50"]
    assert (resnet.architecture, resnet.patch_size, resnet.knn, resnet.linear) == (
        "resnet50",
        None,
        67.5,
        75.3,
    )
    assert len(DINO) == 9
    assert all(published.knn < published.linear for published in DINO.values())


@pytest.mark.parametrize(
    ("name", "url", "blocks", "patch_mean"),
    [
        ("dino_vit_small_16", "dino_deitsmall16_pretrain/dino_deitsmall16_linearweights.pth", 4, False),
        ("dino_vit_small_8", "dino_deitsmall8_pretrain/dino_deitsmall8_linearweights.pth", 4, False),
        ("dino_vit_base_16", "dino_vitbase16_pretrain/dino_vitbase16_linearweights.pth", 1, True),
        ("dino_vit_base_8", "dino_vitbase8_pretrain/dino_vitbase8_linearweights.pth", 1, True),
        ("dino_resnet50", "dino_resnet50_pretrain/dino_resnet50_linearweights.pth", 1, False),
        (
            "dino_xcit_medium_24_p8",
            "dino_xcit_medium_24_p8_pretrain/dino_xcit_medium_24_p8_linearweights.pth",
            1,
            False,
        ),
    ],
)
def test_linear_weights_lie_beside_dinos_files_and_say_what_they_were_given(
    name: str, url: str, blocks: int, patch_mean: bool
) -> None:
    published = DINO[name]
    assert published.linear_url == f"https://dl.fbaipublicfiles.com/dino/{url}"
    assert (published.linear_blocks, published.linear_patch_mean) == (blocks, patch_mean)
    assert published.url.rpartition("/")[0] == published.linear_url.rpartition("/")[0]


def test_supervised_files_have_no_linear_probe() -> None:
    assert all(
        (published.linear_url, published.linear, published.knn) == (None, None, None)
        for published in SUPERVISED.values()
    )


def test_every_published_file_belongs_to_a_known_architecture() -> None:
    known = {*ARCHITECTURES, "vit_small", "vit_base", "resnet50"}
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
