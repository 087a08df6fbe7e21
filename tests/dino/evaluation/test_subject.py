"""The backbone that is judged: which one the options mean, and how its features are had."""

import argparse
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dino.evaluation import extraction
from dino.evaluation.evaluation_options import BackboneOptions, FeatureOptions
from dino.evaluation.labelled_features import labelled_features, set_features
from dino.evaluation.subject import create_subject, resolve_options
from dino.runtime import distributed
from dino.runtime.backbones import create_backbone, tensors_sha256
from dino.runtime.options import AUTO, RANDOM, UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import CPU, write_pictures

SMALL = BackboneOptions(
    arch="xcit_pico_3_p8", pretrained_weights=RANDOM, image_size=16, num_workers=0, device="cpu"
)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint as a training does."""

    def write(arch, patch_size=16, args=None, key="teacher"):
        torch.manual_seed(5)
        backbone = create_backbone(arch, patch_size)
        state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
        torch.save({key: state, "epoch": 3, **({"args": args} if args else {})}, tmp_path / "checkpoint.pth")
        return str(tmp_path / "checkpoint.pth"), tensors_sha256(backbone)

    return write


# Which weights


@pytest.mark.parametrize(
    ("arch", "patch_size", "weights", "expected"),
    [
        (AUTO, 16, "", ("vit_small", 16, "dino_vit_small_16")),
        (AUTO, 8, "", ("vit_small", 8, "dino_vit_small_8")),
        (AUTO, 16, RANDOM, ("vit_small", 16, RANDOM)),
        (AUTO, 16, "dino_vit_base_8", ("vit_base", 8, "dino_vit_base_8")),
        (AUTO, 16, "dino_xcit_small_12_p8", ("xcit_small_12_p8", 16, "dino_xcit_small_12_p8")),
        (AUTO, 16, "xcit_nano_12_p16_224", ("xcit_nano_12_p16", 16, "xcit_nano_12_p16_224")),
        ("vit_small", 8, "", ("vit_small", 8, "dino_vit_small_8")),
        ("deit_small", 16, "", ("deit_small", 16, "dino_vit_small_16")),
        ("resnet50", 16, "", ("resnet50", 16, "dino_resnet50")),
        ("vit_tiny", 16, RANDOM, ("vit_tiny", 16, RANDOM)),
        (
            "vit_tiny",
            16,
            "dino_vit_base_8",
            ("vit_tiny", 16, "dino_vit_base_8"),
        ),  # a misfit is told on loading
    ],
)
def test_auto_and_empty_names_stand_for_architectures_and_published_weights(
    arch, patch_size, weights, expected
):
    found = resolve_options(BackboneOptions(arch=arch, patch_size=patch_size, pretrained_weights=weights))
    assert (found.arch, found.patch_size, found.pretrained_weights) == expected


@pytest.mark.parametrize(
    ("arch", "patch_size"), [("xcit_nano_12_p16", 16), ("vit_small", 14), ("vit_tiny", 16)]
)
def test_weights_that_nobody_published_are_one_sentence(arch, patch_size):
    sentence = (
        f"there are no published DINO weights of {arch} with patch size {patch_size}: name weights with "
        "--pretrained_weights, or random for a baseline"
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        resolve_options(BackboneOptions(arch=arch, patch_size=patch_size))


@pytest.mark.parametrize(
    ("arch", "patch_size", "args"),
    [
        ("vit_tiny", 8, {"arch": "vit_tiny", "patch_size": 8}),
        ("vit_tiny", 8, argparse.Namespace(arch="deit_tiny", patch_size=8)),
        ("xcit_pico_3_p8", 16, {"arch": "xcit_pico_3_p8", "patch_size": 16}),
    ],
    ids=str,
)
def test_a_checkpoint_knows_what_network_it_is_of(checkpoint, capsys, arch, patch_size, args):
    path, sha256 = checkpoint(arch, patch_size, args)
    subject = create_subject(replace(SMALL, arch=AUTO, pretrained_weights=path), CPU)
    assert subject.origin.backbone_sha256 == sha256 and len(subject.origin.weights_sha256) == 64
    assert subject.origin.weights == path
    assert re.search(
        rf"^{subject.origin.arch}: \d+ of \d+ tensors loaded from {path}", capsys.readouterr().out
    )


def test_a_checkpoint_that_does_not_say_is_tried_as_dinos_vit_and_the_misfit_told(checkpoint):
    path, _ = checkpoint("xcit_pico_3_p8")
    with pytest.raises(
        UserError, match=r"looks like an XCiT of width 96, .* the model is a ViT of width 384"
    ):
        create_subject(replace(SMALL, arch=AUTO, pretrained_weights=path), CPU)


def test_the_student_is_taken_when_asked_for(checkpoint):
    path, sha256 = checkpoint("xcit_pico_3_p8", key="student")
    options = replace(SMALL, pretrained_weights=path)
    assert create_subject(replace(options, checkpoint_key="student"), CPU).origin.backbone_sha256 == sha256
    with pytest.raises(UserError, match="has no network 'teacher'; it has student"):
        create_subject(options, CPU)


def test_random_weights_are_a_baseline_that_the_seed_decides(capsys):
    torch.manual_seed(3)
    expected = tensors_sha256(create_backbone("xcit_pico_3_p8"))
    subject = create_subject(replace(SMALL, seed=3), CPU)
    assert subject.origin.backbone_sha256 == expected and subject.origin.weights_sha256 is None
    assert capsys.readouterr().out == "xcit_pico_3_p8: random weights, a baseline (seed 3)\n"
    assert create_subject(replace(SMALL, seed=4), CPU).origin.backbone_sha256 != expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"arch": "vit_tiny", "image_size": 100},
            "--image_size 100: must be a multiple of the patch's side, 16 pixels; 96 is near",
        ),
        ({"arch": "vit_tiny", "image_size": 12, "patch_size": 8}, "--image_size 12: must be a multiple"),
        ({"arch": "mixer_s32_224"}, "--image_size 16: MlpMixer takes pictures of 224 x 224 pixels only"),
        ({"image_size": 0}, "--image_size must be 1 or more, got 0"),
        ({"patch_size": 0}, "--patch_size must be 1 or more, got 0"),
        ({"batch_size_per_gpu": 0}, "--batch_size_per_gpu must be 1 or more, got 0"),
        ({"num_workers": -1}, "--num_workers must be 0 or more, got -1"),
        ({"seed": -1}, "--seed must be 0 or more, got -1"),
        ({"seed": 2**63}, "--seed must be below 2^63, got 9223372036854775808"),
        ({"arch": "xcit_pico"}, "unknown model 'xcit_pico'; did you mean xcit_pico_3_p8"),
        (
            {"pretrained_weights": "dino_vit_smal_16"},
            "there is no file dino_vit_smal_16, and no published weights",
        ),
    ],
)
def test_what_cannot_be_judged_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}"):
        create_subject(replace(SMALL, **changes), CPU)


def test_facts_are_plain_and_tell_what_the_numbers_depend_on():
    subject = create_subject(replace(SMALL, precision="bf16", as_stored=True), CPU)
    facts = subject.facts
    assert facts["preprocessing"] == {
        "size": 16,
        "resize_ratio": 256 / 224,
        "precision": "bf16",
        "as_stored": True,
    }
    assert facts["processes"] == 1 and facts["device"].startswith("CPU (")
    assert facts["backbone_sha256"] == tensors_sha256(subject.extractor.backbone)
    assert facts["options"]["arch"] == "xcit_pico_3_p8" and facts["options"]["image_size"] == 16


# Features


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "train", count=3)
    write_pictures(tmp_path / "val", count=2, seed=1)
    return tmp_path


def options_for(folder, **changes):
    return FeatureOptions(**{**vars(SMALL), "data_path": str(folder), **changes})


def test_loading_and_computing_share_the_cores(folder, monkeypatch):
    threads, loading = [], []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *arguments, num_workers, **settings):
            loading.append(num_workers)
            super().__init__(*arguments, num_workers=0, **settings)

    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(distributed, "usable_cores", lambda: 6)
    monkeypatch.setattr(extraction, "DataLoader", Loader)
    labelled_features(options_for(folder, num_workers=10))
    assert (threads, loading) == ([3, 3, 6], [3, 3])  # and all of them for what comes after


def test_labels_of_val_are_places_among_trains_classes(folder):
    (folder / "train" / "cats").rename(folder / "train" / "zebras")
    (folder / "val" / "cats").rename(folder / "val" / "zebras")
    write_pictures(folder / "more", classes=("apes",), count=1)
    (folder / "more" / "apes").rename(folder / "train" / "apes")
    features = labelled_features(options_for(folder))
    assert features.classes == ["apes", "dogs", "zebras"]
    assert features.train_labels.tolist() == [0, 1, 1, 1, 2, 2, 2]
    assert features.val_labels.tolist() == [1, 1, 2, 2]
    assert features.facts["pictures"] == {"train": 7, "val": 4} and not features.one_set


def test_kept_features_are_those_that_are_not_kept(folder, tmp_path):
    in_memory = labelled_features(options_for(folder))
    kept = labelled_features(options_for(folder, features_dir=str(tmp_path / "kept")))
    for half in ("train", "val"):
        one, other = getattr(in_memory, half), getattr(kept, half)
        assert one.names == other.names and one.rows.keys() == other.rows.keys()
        for kind in one.rows:
            np.testing.assert_array_equal(one[kind], other[kind])
    assert in_memory.facts["data_sha256"] == kept.facts["data_sha256"]


@pytest.mark.parametrize("wrong", [False, True])
def test_several_processes_leave_no_folder_of_features_behind(folder, tmp_path, monkeypatch, wrong):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    options = options_for(folder)
    subject = create_subject(options, CPU)
    if wrong:
        subject.extractor.backbone.norm.weight.data.fill_(torch.nan)
    # One process that takes the way of several.
    sizes = iter([1, 2])
    monkeypatch.setattr("dino.runtime.distributed.world_size", lambda: next(sizes, 1))
    pictures = open_pictures(str(folder / "train"))
    if wrong:
        with pytest.raises(UserError, match="are not finite"):
            set_features(options, subject, "train", pictures, ("cls",))
    else:
        features, _ = set_features(options, subject, "train", pictures, ("cls",))
        assert features["cls"].shape == (6, 96) and not isinstance(features["cls"], np.memmap)
    assert next(sizes, None) is None and list(temporary.iterdir()) == []
