"""The loader: every layout in, nothing less than a whole backbone, one sentence for every mistake."""

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import xcit
from xcit import WeightsError, XCiT, load_weights
from xcit.weights import read_checkpoint, read_state_dict, resolve

State = dict[str, Tensor]


def pico(num_classes: int = 0, seed: int = 0) -> XCiT:
    torch.manual_seed(seed)
    return xcit.create_model("xcit_pico_3_p8", num_classes=num_classes)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def timm_names(state: State) -> State:
    """As timm's own conversion has it, written out: three projections instead of one."""
    renamed: State = {}
    for name, value in state.items():
        if name.startswith("cls_attn_blocks.") and ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{letter}.")] = part
        else:
            renamed[name.replace("pos_embeder.", "pos_embed.")] = value
    return renamed


def dino_checkpoint(state: State, prefix: str = "module.") -> dict[str, Any]:
    """As DINO's training writes it, with its head, its options and numpy's rates in the optimizer."""
    head = {
        f"{prefix}head.mlp.0.weight": torch.zeros(4, 96),
        f"{prefix}head.last_layer.weight_g": torch.ones(4, 1),
    }
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "student": {**prefixed(zeros, f"{prefix}backbone."), **head},
        "teacher": {**prefixed(state, f"{prefix}backbone."), **head},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "params": [0, 1]}]},
        "epoch": 3,
        # run_with_submitit.py makes the folder a path
        "args": argparse.Namespace(arch="xcit_small_12_p16", output_dir=Path("/checkpoint/dino")),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "bare": lambda state: state,
    "official": lambda state: {"model": state},
    "dino": dino_checkpoint,
    "dino on one process": lambda state: dino_checkpoint(state, prefix=""),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "distributed and compiled": lambda state: prefixed(state, "module._orig_mod."),
    "compiled in parts": lambda state: {
        k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in state.items()
    },
    "timm": timm_names,
    "detector": lambda state: {
        "meta": {"epoch": 36},
        "state_dict": {**prefixed(state, "backbone."), "neck.convs.0.weight": torch.zeros(2)},
    },
    "with random states": lambda state: {"teacher": state, "rng_state": torch.zeros(8, dtype=torch.uint8)},
    "without counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    "with other keys": lambda state: {"model": {**state, 3: torch.zeros(1), "scale": np.float16(1)}},
    "half precision": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_fills_the_whole_backbone(layout: str, tmp_path: Path) -> None:
    source, target = pico(seed=0), pico(seed=1)
    file = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](source.state_dict()), file)
    report = load_weights(target, file)
    assert report.matched == report.total
    assert (report.missing, report.unexpected) == ([], [])
    tolerance = {"atol": 1e-4, "rtol": 1e-3} if layout == "half precision" else {"atol": 0, "rtol": 0}
    for name, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], value, **tolerance, msg=name)


def test_report_is_one_line(tmp_path: Path) -> None:
    model = pico(num_classes=2)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    report = load_weights(pico(), tmp_path / "weights.safetensors")
    total = len(pico().state_dict())
    assert report.sha256 is not None
    assert str(report) == (
        f"{total} of {total} tensors loaded from {tmp_path}/weights.safetensors "
        f"(sha256 {report.sha256[:8]}...), left over: head.bias; head.weight"
    )


def test_timms_xcit_converts_to_the_same_function() -> None:
    theirs = timm.create_model("xcit_nano_12_p16_224", num_classes=7).eval()
    ours = xcit.create_model("xcit_nano_12_p16", num_classes=7).eval()
    assert load_weights(ours, theirs.state_dict()).matched == 383
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=0)


def test_student_or_teacher_is_taken_as_asked() -> None:
    state = pico().state_dict()
    checkpoint = dino_checkpoint(state)
    assert torch.equal(read_state_dict(checkpoint)["cls_token"], state["cls_token"])
    assert not read_state_dict(checkpoint, key="student")["cls_token"].any()
    with pytest.raises(
        WeightsError, match=r"^the state dict has no network 'ema'; it has teacher and student$"
    ):
        read_state_dict(checkpoint, key="ema")


def test_dinos_vits_load_into_timms_vit() -> None:
    def vit() -> nn.Module:
        return VisionTransformer(patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=0)

    source, target = vit(), vit()
    report = load_weights(target, {"teacher": prefixed(source.state_dict(), "module.backbone.")})
    assert report.matched == report.total
    assert torch.equal(target.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_a_numpy_1_checkpoint_of_dino_is_read(tmp_path: Path) -> None:
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    torch.save(dino_checkpoint(pico().state_dict()), new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.namelist():
            data = source.read(item)
            target.writestr(item, data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert read_checkpoint(old)["optimizer"]["param_groups"][0]["lr"] == 5e-4
    assert read_checkpoint(old)["args"].arch == "xcit_small_12_p16"


def refusal(model: nn.Module, source: Any) -> str:
    """The sentence with which weights are refused; the model must stay as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


def test_less_than_the_whole_backbone_is_refused_by_name() -> None:
    state = {name: value for name, value in pico().state_dict().items() if not name.startswith("norm.")}
    total = len(pico().state_dict())
    assert refusal(pico(), {**state, "extra": torch.zeros(1)}) == (
        f"a state dict does not fit the model's {total} tensors: 2 missing (norm.weight; norm.bias), "
        "1 left over (extra); the file may hold a part of a model, or another version of it; "
        "allow_partial loads what fits, if anything does"
    )


def test_partial_weights_load_when_allowed() -> None:
    state = {name: value for name, value in pico(seed=1).state_dict().items() if not name.startswith("norm.")}
    model = pico(seed=0)
    report = load_weights(model, {**state, "extra": torch.zeros(1)}, allow_partial=True)
    assert (report.missing, report.unexpected) == (["norm.weight", "norm.bias"], ["extra"])
    assert report.matched == report.total - 2
    assert torch.equal(model.cls_token, state["cls_token"])


def test_nothing_that_fits_is_refused_even_when_partial_is_allowed() -> None:
    with pytest.raises(WeightsError, match="1 left over"):
        load_weights(pico(), {"linear.weight": torch.zeros(1)}, allow_partial=True)


def test_another_architecture_is_named() -> None:
    message = refusal(pico(), xcit.create_model("xcit_nano_12_p16").state_dict())
    assert "cls_token 1x1x128, not 1x1x96" in message
    assert (
        "the file looks like an XCiT of width 128, depth 12 and patch size 16, "
        "the model is an XCiT of width 96, depth 3 and patch size 8"
    ) in message


def test_a_vit_is_named() -> None:
    vit = VisionTransformer(patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=0)
    assert "looks like a ViT of width 48, depth 2 and patch size 16, the model is an XCiT" in refusal(
        pico(), vit.state_dict()
    )


def test_a_deeper_network_does_not_pass_for_a_shallow_one() -> None:
    deep = pico().state_dict()
    deep.update(
        {name.replace("blocks.0.", "blocks.3."): deep[name] for name in list(deep) if name[:8] == "blocks.0"}
    )
    message = refusal(pico(), deep)
    assert "missing" not in message
    assert "of width 96, depth 4 and" in message


def test_a_head_of_other_classes_is_refused() -> None:
    message = refusal(pico(num_classes=3), pico(num_classes=5).state_dict())
    assert "2 of another shape (head.weight 5x96, not 3x96; head.bias 5, not 3)" in message
    assert "only the classification head differs" in message
    report = load_weights(pico(num_classes=3), pico(num_classes=5).state_dict(), allow_partial=True)
    assert report.missing == ["head.weight", "head.bias"]


def test_a_file_without_a_head_is_refused_by_a_classifier() -> None:
    message = refusal(pico(num_classes=3), pico().state_dict())
    assert "2 missing (head.weight; head.bias); only the classification head differs" in message


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("evil",))


def whole(file: Path) -> None:
    torch.save(pico().state_dict(), file)


def cut(file: Path) -> None:
    whole(file)
    file.write_bytes(file.read_bytes()[:-1000])


def cut_safetensors(file: Path) -> None:
    safetensors.torch.save_file(pico().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])


def one_flipped_name(file: Path) -> None:
    whole(file)
    file.write_bytes(file.read_bytes().replace(b"cls_token", b"cls_\xff\xff\xff\xff\xff", 1))


DAMAGED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "empty": ("a.pth", lambda file: file.write_bytes(b""), r"\(0 bytes\) is not a weights file"),
    "text": (
        "a.pth",
        lambda file: file.write_text("hello world"),
        r"is not a weights file, or it is damaged",
    ),
    "page": ("a.pth", lambda file: file.write_text("<!DOCTYPE html>"), r"is not a weights file"),
    "cut": ("a.pth", cut, r"is not a weights file, or it is damaged or cut short"),
    "cut safetensors": ("a.safetensors", cut_safetensors, r"is damaged or cut short"),
    "flipped": ("a.pth", one_flipped_name, r"is not a weights file, or it is damaged"),
    "empty safetensors": ("a.safetensors", lambda file: file.write_bytes(b""), r"\(0 bytes\) is not"),
    "a list": ("a.pth", lambda file: torch.save([1], file), r"holds a list, not a state dict"),
    "no tensors": (
        "a.pth",
        lambda file: torch.save({"epoch": 3, "model": {"a": 1}}, file),
        r"holds no tensors where weights are kept; its keys: epoch; model$",
    ),
    "code": (
        "a.pth",
        lambda file: torch.save({"model": Evil()}, file),
        r"refers to posix\.mkdir, which could run code when read",
    ),
    "legacy code": (
        "a.pth",
        lambda file: file.write_bytes(pickle.dumps(Evil(), protocol=2)),
        r"which could run code",
    ),
    "scalar class token": (
        "a.pth",
        lambda file: torch.save({"cls_token": torch.tensor(0.0), "blocks.0.a": torch.zeros(1)}, file),
        r"the file looks like neither an XCiT nor a ViT",
    ),
    "torn q, k and v": (
        "a.pth",
        lambda file: torch.save(
            {
                "cls_attn_blocks.0.attn.q.weight": torch.zeros(2, 3),
                "cls_attn_blocks.0.attn.k.weight": torch.zeros(2, 4),
            },
            file,
        ),
        r"does not fit the model's",
    ),
    "a long name": ("a" * 300, lambda file: None, r"^cannot look for .*: File name too long$"),
    "folder": ("a.pth", lambda file: file.mkdir(), r"is a folder; name the weights file in it"),
    "nothing": ("a.pth", lambda file: None, r"^there is no file .*; check the path$"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_bad_file_gets_one_sentence_that_names_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, make, sentence = DAMAGED[kind]
    file = tmp_path / name
    make(file)
    message = refusal(pico(), file)
    assert re.search(sentence, message), message
    assert str(file) in message
    assert "\n" not in message
    assert not Path("evil").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
def test_a_files_kind_is_told_by_its_content(name: str, tmp_path: Path) -> None:
    state = pico().state_dict()
    torch.save(state, tmp_path / name)
    assert load_weights(pico(seed=1), tmp_path / name).missing == []
    safetensors.torch.save_file(state, tmp_path / name)
    assert load_weights(pico(seed=1), tmp_path / name).missing == []


def test_a_missing_file_does_not_list_the_zoo() -> None:
    with pytest.raises(WeightsError, match=r"^there is no file checkpoint\.pth, .*; check the path$"):
        resolve("checkpoint.pth")
    with pytest.raises(WeightsError, match=r"^cannot look for ~nobody_of_that_name/x\.pth: "):
        resolve("~nobody_of_that_name/x.pth")


def test_a_misspelt_published_name_gets_the_nearest() -> None:
    message = r"^there is no file dino_xcit_smal_12_p16, .*; did you mean dino_xcit_small_12_p16, "
    with pytest.raises(WeightsError, match=message):
        resolve("dino_xcit_smal_12_p16")
