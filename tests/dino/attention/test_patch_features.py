"""Patch features against the backbones' own, cosines and components against numpy."""

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dino.attention.maps import attention_maps, prepare
from dino.attention.patch_features import (
    OutsideError,
    PrincipalColors,
    feature_at,
    patch_features,
    similarity,
)
from dino.runtime.options import UserError
from xcit import XCiT


def tiny_xcit() -> XCiT:
    torch.manual_seed(0)
    return XCiT(patch_size=8, embed_dim=16, depth=1, num_heads=4, eta=1.0)


def tiny_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True
    )


def pixels(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, cols, 3), dtype=np.uint8)


def random_features(rows: int, cols: int, channels: int, seed: int = 0) -> np.ndarray:
    """Features whose channels spread differently, about a centre far from zero."""
    spread = np.arange(channels, 0, -1) ** 2
    return (50 + np.random.default_rng(seed).standard_normal((rows, cols, channels)) * spread).astype(
        np.float32
    )


@pytest.mark.parametrize("make", [tiny_xcit, tiny_vit])
@pytest.mark.parametrize("size", [(24, 40), (37, 61), (5, 3)])
def test_features_are_the_patch_tokens_on_the_grid_of_the_maps(make, size):
    backbone, image = make().train(), pixels(*size)
    features = patch_features(backbone, image)
    assert backbone.training and features.dtype == np.float32
    with torch.no_grad():
        tokens = backbone.eval().forward_features(prepare(backbone, image[None]))[0, 1:]
    rows, cols = attention_maps(backbone, image[None]).shape[2:]
    for row, col in [(0, 0), (0, cols - 1), (rows - 1, 0), (rows - 1, cols - 1)]:
        np.testing.assert_allclose(features[row, col], tokens[row * cols + col].numpy(), atol=1e-5)
    assert features.shape == (rows, cols, tokens.shape[1])


def test_a_patch_changes_its_own_feature_most():
    backbone, image = tiny_vit(), np.full((24, 32, 3), 128, np.uint8)
    marked = image.copy()
    marked[8:16, 24:32] = pixels(8, 8)
    change = np.linalg.norm(patch_features(backbone, marked) - patch_features(backbone, image), axis=-1)
    assert np.unravel_index(change.argmax(), change.shape) == (1, 3)


def test_a_network_without_patches_is_refused():
    with pytest.raises(UserError, match="no class attention to draw in ResNet: --arch takes"):
        patch_features(timm.create_model("resnet18", num_classes=0), pixels(32, 32))
    with pytest.raises(UserError, match="in Identity"):
        patch_features(nn.Identity(), pixels(32, 32))


@pytest.mark.parametrize("tile", [8, 64, 104])
def test_tiles_change_no_feature_where_patches_see_their_neighbours_only(tile: int):
    backbone, image = tiny_xcit(), pixels(203, 165)
    for block in backbone.blocks:
        nn.init.zeros_(block.gamma1)  # no cross-covariance attention: the rest is local
    whole = patch_features(backbone, image)
    assert whole.std(axis=(0, 1)).min() > 1e-3
    np.testing.assert_allclose(patch_features(backbone, image, tile=tile), whole, atol=1e-4)


def test_features_are_tiled_only_where_the_picture_is_larger():
    backbone, image = tiny_xcit(), pixels(64, 240)
    whole = patch_features(backbone, image)
    np.testing.assert_array_equal(patch_features(backbone, image, tile=240), whole)
    assert (patch_features(backbone, image, tile=80) != whole).any()


def test_similarity_is_the_cosine():
    features = random_features(3, 4, 5)
    reference = features[1, 2]
    likeness = similarity(features, 7 * reference)
    expected = [
        [f @ reference / np.linalg.norm(f) / np.linalg.norm(reference) for f in row] for row in features
    ]
    assert likeness.dtype == np.float32
    np.testing.assert_allclose(likeness, expected, atol=1e-6)
    np.testing.assert_allclose(similarity(features, -reference), -likeness, atol=1e-6)
    assert likeness[1, 2] == pytest.approx(1) and np.abs(likeness).max() <= 1


def test_nothing_is_like_a_feature_of_zero():
    features = random_features(2, 2, 5)
    features[0, 1] = 0
    assert similarity(features, features[0, 0])[0, 1] == 0
    assert not similarity(features, features[0, 1]).any()


def test_a_point_is_a_row_and_a_column_of_pixels():
    features = random_features(3, 4, 2)
    np.testing.assert_array_equal(feature_at(features, (0, 0), 8), features[0, 0])
    np.testing.assert_array_equal(feature_at(features, (7, 8), 8), features[0, 1])
    np.testing.assert_array_equal(feature_at(features, (23, 31), 8), features[2, 3])


@pytest.mark.parametrize("point", [(24, 0), (0, 32), (-1, 0), (0, -1)])
def test_a_point_outside_is_refused_with_the_pictures_size(point):
    with pytest.raises(OutsideError, match=rf"the point {point[1]} {point[0]} lies .* of 32 x 24 pixels"):
        feature_at(random_features(3, 4, 2), point, 8)
    with pytest.raises(OutsideError, match=r"of 30 x 20 pixels: its x .* 0 and 29, its y between 0 and 19$"):
        feature_at(random_features(3, 4, 2), (20, 3), 8, size=(20, 30))


def test_colours_are_the_first_three_principal_components():
    frames = [random_features(6, 7, 9), random_features(5, 4, 9, seed=1)]
    colors = PrincipalColors.fit(frames)
    patches = np.concatenate([frame.reshape(-1, 9) for frame in frames]).astype(np.float64)
    centred = patches - patches.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    axes *= np.sign([axis[np.abs(axis).argmax()] for axis in axes])[:, None]
    np.testing.assert_allclose(colors.components, axes, atol=1e-4)
    projected = centred @ axes.T
    low, high = np.percentile(projected, (1, 99), axis=0)
    expected = 255 * np.clip((projected - low) / (high - low), 0, 1)
    drawn = np.concatenate([colors(frame).reshape(-1, 3) for frame in frames])
    assert drawn.dtype == np.uint8
    np.testing.assert_allclose(drawn, expected, atol=0.6)
    assert {0, 255} <= set(drawn.flatten())


def test_a_feature_has_one_colour_in_all_frames():
    colors = PrincipalColors.fit([random_features(6, 7, 9)])
    frame = random_features(4, 5, 9, seed=1)
    darker = frame.copy()
    darker[2:] = 1000
    np.testing.assert_array_equal(colors(darker)[:2], colors(frame)[:2])
    assert colors(darker).shape == (4, 5, 3)


def test_fitting_again_gives_the_same_colours_and_leaves_the_features_alone():
    features = random_features(5, 6, 4)
    before = features.copy()
    once = PrincipalColors.fit([features])(features)
    mirrored = PrincipalColors.fit([features[::-1]])(features)
    np.testing.assert_array_equal(features, before)
    assert np.abs(once.astype(int) - mirrored).max() <= 1


@pytest.mark.parametrize(
    ("shape", "components"), [((4, 5, 1), 1), ((4, 5, 2), 2), ((1, 2, 8), 1), ((1, 1, 8), 0), ((1, 3, 8), 2)]
)
def test_components_that_the_features_do_not_have_are_half_bright(shape, components):
    features = random_features(*shape)
    colors = PrincipalColors.fit([features])
    assert len(colors.components) == components
    drawn = colors(features)
    assert (drawn[..., components:] == 128).all()
    assert all(np.ptp(drawn[..., channel]) == 255 for channel in range(components))


@pytest.mark.parametrize("level", [0.0, 3.0, 1e-20, -1e6])
def test_constant_features_are_an_even_grey(level):
    features = np.full((3, 4, 6), level, np.float32) * np.arange(6, dtype=np.float32)
    assert (PrincipalColors.fit([features, features])(features) == 128).all()


def test_colours_need_a_picture():
    with pytest.raises(ValueError, match="at least one picture"):
        PrincipalColors.fit([])
