"""Patch embedding and position encoding."""

import copy
import math
import pickle

import pytest
import torch
from timm.models.xcit import PositionalEncodingFourier

from xcit.embedding import FourierPosition, PatchEmbedding, _cache, _cached_features, fourier_features

CPU = torch.device("cpu")


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(1, 17), (16, 16), (37, 64), (100, 225)])
def test_grid_is_the_size_over_the_patch_size_rounded_up(patch_size: int, height: int, width: int) -> None:
    embedding = PatchEmbedding(patch_size=patch_size, embed_dim=16).eval()
    grid = embedding(torch.zeros(1, 3, height, width))
    assert grid.shape == (1, 16, math.ceil(height / patch_size), math.ceil(width / patch_size))


def test_other_patch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^patch size must be 8 or 16, got 14; see xcit\.list_models\(\)$"):
        PatchEmbedding(patch_size=14, embed_dim=16)


def test_features_follow_the_formula_rows_first() -> None:
    rows, cols = 3, 5
    expected = torch.empty(64, rows, cols)
    for row in range(rows):
        for col in range(cols):
            for offset, position in ((0, (row + 1) / rows), (32, (col + 1) / cols)):
                for k in range(16):
                    angle = 2 * math.pi * position / 10_000 ** (k / 16)
                    expected[offset + 2 * k, row, col] = math.sin(angle)
                    expected[offset + 2 * k + 1, row, col] = math.cos(angle)
    torch.testing.assert_close(fourier_features(rows, cols, CPU)[0], expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_equals_timms_on_a_long_grid(dtype: torch.dtype) -> None:
    ours, theirs = FourierPosition(8), PositionalEncodingFourier(dim=8)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.to(dtype)(2, 3000), theirs.to(dtype)(1, 2, 3000))


def test_features_are_made_once_per_size_and_few_are_kept() -> None:
    first = _cached_features(7, 9, CPU)
    assert _cached_features(7, 9, CPU) is first
    for side in range(1, 20):
        _cached_features(side, side, CPU)
    assert len(_cache) <= 4
    assert torch.equal(_cached_features(7, 9, CPU), first)


def test_copies_and_pickles_carry_parameters_only() -> None:
    position = FourierPosition(8)
    position(300, 300)
    assert set(position.state_dict()) == {"token_projection.weight", "token_projection.bias"}
    assert len(pickle.dumps(position)) < 100_000
    assert torch.equal(copy.deepcopy(position)(4, 6), position(4, 6))


def test_training_works_after_inference_mode_has_filled_the_cache() -> None:
    _cache.clear()
    position = FourierPosition(8)
    with torch.inference_mode():
        position(4, 6)
    position(4, 6).sum().backward()
    assert position.token_projection.weight.grad is not None


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("size", [(64, 48), (37, 52), (129, 33), (16, 200)])
@pytest.mark.parametrize("band_pixels", [1, 1600, 4000])
def test_bands_of_a_large_image_give_the_whole(monkeypatch, patch_size, size, band_pixels):
    torch.manual_seed(0)
    embed = PatchEmbedding(patch_size=patch_size, embed_dim=32).eval()
    for module in embed.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, *size)
    expected = embed(images)
    assert expected.requires_grad, "whole, since it may be trained"
    monkeypatch.setattr("xcit.embedding._BAND_PIXELS", band_pixels)
    with torch.no_grad():
        torch.testing.assert_close(embed(images), expected, atol=1e-5, rtol=1e-5)
