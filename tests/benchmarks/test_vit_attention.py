"""The benchmark of a ViT's class attention, on a small picture."""

import json

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.vit_attention import AttentionOptions, full_attention_maps, measure
from dino.attention.maps import attention_maps
from dino.runtime.options import UserError


@pytest.mark.slow
def test_it_reports_memory_and_time(tmp_path, capsys):
    report = tmp_path / "report.json"
    measure(AttentionOptions(arch="vit_tiny", side=64, turns=1, output=str(report)))
    numbers = json.loads(report.read_text())
    assert {"date", "command", "machine", "versions"} <= numbers.keys()
    rows = {row["path"]: row for row in numbers["comparisons"]}
    name = "vit_tiny, class attention at 64"
    assert list(rows) == [f"{name}, peak memory", f"{name}, fp32", f"{name}, bf16"]
    assert [row["unit"] for row in rows.values()] == ["MB", "ms", "ms"]
    assert all(row["theirs"][0] > 0 and row["ours"][0] > 0 for row in rows.values())
    assert [row["target"] for row in rows.values()] == [8, 2.5, None]
    assert f"{name}, fp32" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(32, 48), (29, 41)])
def test_both_ways_are_the_same_attention(size):
    torch.manual_seed(0)
    vit = VisionTransformer(
        *(32, 8), embed_dim=12, depth=3, num_heads=3, num_classes=0, dynamic_img_size=True, init_values=0.5
    ).eval()
    for name, parameter in vit.named_parameters():
        if "qkv" in name:
            # Or all weights would be nearly the same; larger, and logits of some tens would round their sixth digit.
            torch.nn.init.normal_(parameter, std=0.5)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    expected = full_attention_maps(vit, images)
    assert expected.shape == (2, 3, -(-size[0] // 8), -(-size[1] // 8)) and expected.std() > 0.01
    np.testing.assert_allclose(attention_maps(vit, images), expected, atol=1e-6)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="--side must be 1 or more, got 0"):
        measure(AttentionOptions(side=0))
