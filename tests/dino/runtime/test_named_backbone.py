"""What a user's names stand for, and what weights say that they are for."""

import argparse
import re

import pytest
import torch

from dino.runtime.backbones import create_backbone, tensors_sha256
from dino.runtime.named_backbone import (
    architecture_of,
    open_backbone,
    published_dino_weights,
    resolve_weights,
    stored_options,
)
from dino.runtime.options import UserError
from xcit.zoo import DINO, PUBLISHED


@pytest.mark.parametrize(
    ("arch", "patch_size", "name"),
    [
        ("vit_small", 16, "dino_vit_small_16"),
        ("vit_small", 8, "dino_vit_small_8"),
        ("deit_small", 16, "dino_vit_small_16"),
        ("deit_small", 8, "dino_vit_small_8"),
        ("vit_base", 8, "dino_vit_base_8"),
        ("xcit_small_12_p8", 16, "dino_xcit_small_12_p8"),
        ("resnet50", 16, "dino_resnet50"),
        ("vit_small", 14, None),
        ("vit_tiny", 16, None),
        ("xcit_nano_12_p16", 16, None),
    ],
)
def test_the_published_dino_weights_of_an_architecture(arch, patch_size, name):
    assert published_dino_weights(arch, patch_size) == name


def test_published_names_tell_their_architecture_without_a_download():
    for name, published in PUBLISHED.items():
        assert architecture_of(name) == (published.architecture, published.patch_size)
    assert all(published_dino_weights(*architecture_of(name)) == name for name in DINO)


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        ({"arch": "vit_tiny", "patch_size": 8}, ("vit_tiny", 8)),
        (argparse.Namespace(arch="deit_small", patch_size=16), ("deit_small", 16)),
        ({"arch": "xcit_pico_3_p8"}, ("xcit_pico_3_p8", None)),
        ({"arch": "xcit_pico_3_p8", "patch_size": "16"}, ("xcit_pico_3_p8", None)),
        ({"arch": None}, None),
        ({"epochs": 3}, None),
        ({}, None),
        (None, None),
        (["--arch", "vit_tiny"], None),
        ("absent", None),
    ],
    ids=str,
)
def test_a_checkpoint_tells_its_architecture_by_its_options(tmp_path, args, answer):
    checkpoint = {"teacher": {"backbone.norm.weight": torch.ones(2)}}
    torch.save(checkpoint if args == "absent" else {**checkpoint, "args": args}, tmp_path / "checkpoint.pth")
    assert architecture_of(str(tmp_path / "checkpoint.pth")) == answer
    assert isinstance(dict(stored_options(str(tmp_path / "checkpoint.pth"))), dict)


def test_weights_that_are_not_there_are_a_users_error(tmp_path):
    with pytest.raises(UserError, match=rf"^there is no file {re.escape(str(tmp_path))}/none\.pth, "):
        architecture_of(str(tmp_path / "none.pth"))
    (tmp_path / "noise.pth").write_bytes(b"noise")
    with pytest.raises(UserError, match="is not a weights file, or it is damaged"):
        architecture_of(str(tmp_path / "noise.pth"))


def test_what_is_left_open_is_what_the_weights_say_or_dinos(tmp_path):
    file = str(tmp_path / "checkpoint.pth")
    torch.save({"teacher": {}, "args": {"arch": "vit_tiny", "patch_size": 16}}, file)
    for given, expected in (
        (("auto", 8, file), ("vit_tiny", 16, file)),
        (("vit_small", 8, file), ("vit_small", 8, file)),
        (("auto", 8, "random"), ("vit_small", 8, "random")),
        (("auto", 16, ""), ("vit_small", 16, "dino_vit_small_16")),
        (("auto", 8, "dino_xcit_small_12_p8"), ("xcit_small_12_p8", 8, "dino_xcit_small_12_p8")),
    ):
        assert resolve_weights(*given) == expected
    with pytest.raises(
        UserError, match="no published DINO weights of vit_tiny with patch size 16: name weights"
    ):
        resolve_weights("vit_tiny", 16, "")


def test_a_backbone_is_opened_with_its_weights_or_by_its_seed(tmp_path):
    backbone = create_backbone("xcit_pico_3_p8")
    file = str(tmp_path / "weights.pth")
    torch.save({"args": {"arch": "xcit_pico_3_p8"}, "teacher": backbone.state_dict()}, file)
    named = open_backbone("auto", 16, file)
    assert not named.network.training and (named.arch, named.source) == ("xcit_pico_3_p8", file)
    assert tensors_sha256(named.network) == tensors_sha256(backbone) and "tensors loaded from" in str(named)
    sums = [
        tensors_sha256(open_backbone("xcit_pico_3_p8", 8, "random", seed=seed).network) for seed in (0, 0, 1)
    ]
    assert sums[0] == sums[1] != sums[2]
    assert str(open_backbone("xcit_pico_3_p8", 8, "random")).endswith("random weights, a baseline (seed 0)")
