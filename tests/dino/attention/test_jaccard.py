"""The scores against loops over pixels and scikit-learn."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import jaccard_score

from dino.attention.ground_truth import Objects
from dino.attention.jaccard import jaccard, object_score, score_picture
from dino.attention.render import mass_mask


def disc(rows: int, cols: int) -> np.ndarray:
    row, col = np.mgrid[:rows, :cols]
    return (row - rows * 0.4) ** 2 + (col - cols * 0.6) ** 2 < (min(rows, cols) * 0.3) ** 2


@pytest.mark.parametrize("size", [(32, 48), (37, 51), (16, 8)])
def test_score_is_the_mass_on_object_pixels_over_their_share(size):
    patch, mask = 8, disc(*size)
    grid = (-(-size[0] // patch), -(-size[1] // patch))
    maps = np.random.default_rng(0).random((2, *grid))
    expected = []
    for weights in maps:
        on_object = 0.0
        for row in range(grid[0]):
            for col in range(grid[1]):
                pixels = mask[row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
                on_object += weights[row, col] * pixels.sum() / pixels.size
        expected.append(on_object / weights.sum() / (mask.sum() / mask.size))
    np.testing.assert_allclose(object_score(maps, mask, patch), expected)


def test_even_attention_scores_one_and_perfect_attention_one_over_the_area():
    mask = np.zeros((32, 32), bool)
    mask[8:24, 8:16] = True
    perfect = mask[::8, ::8].astype(float)
    np.testing.assert_allclose(object_score(np.stack([np.ones((4, 4)), perfect]), mask, 8), [1.0, 8.0])


def test_a_mask_of_another_resolution_scores_the_same():
    small = disc(20, 28)
    large = small.repeat(6, axis=0).repeat(6, axis=1)
    maps = np.random.default_rng(1).random((3, 5, 7))
    expected = object_score(maps, large, 24)
    np.testing.assert_allclose(object_score(maps, small, 24, input_size=(120, 168)), expected)
    fine = np.random.default_rng(1).random((1, 8, 11))  # patches of 2.67 pixels of the mask
    in_detail = object_score(fine, large, 16)
    np.testing.assert_allclose(object_score(fine, small, 16, input_size=(120, 168)), in_detail)


def test_a_map_without_mass_scores_zero():
    assert object_score(np.zeros((1, 2, 2)), disc(16, 16), 8).tolist() == [0.0]


def test_an_empty_mask_and_a_wrong_grid_are_refused():
    with pytest.raises(ValueError, match="mask is empty"):
        object_score(np.ones((1, 2, 2)), np.zeros((16, 16), bool), 8)
    with pytest.raises(ValueError, match=r"has 2 x 2 patches of 8, got a map of 3 x 2"):
        object_score(np.ones((1, 3, 2)), disc(16, 16), 8)


def enlarged(kept: np.ndarray, patch: int, size: tuple[int, int]) -> np.ndarray:
    return kept.repeat(patch, axis=0).repeat(patch, axis=1)[: size[0], : size[1]]


@pytest.mark.parametrize("size", [(32, 48), (37, 51), (16, 8), (5, 3)])
@pytest.mark.parametrize("keep", [0.6, 1.0])
def test_jaccard_is_scikit_learns_at_the_masks_resolution(size: tuple[int, int], keep: float):
    random = np.random.default_rng(0)
    mask, ignore = random.random(size) < 0.4, random.random(size) < 0.2
    maps = random.random((3, -(-size[0] // 8), -(-size[1] // 8)))
    pixels = [enlarged(mass_mask(weights, keep), 8, size) for weights in maps]
    expected = [jaccard_score(mask.ravel(), each.ravel()) for each in pixels]
    np.testing.assert_allclose(jaccard(maps, mask, 8, keep=keep), expected)
    expected = [jaccard_score(mask[~ignore], each[~ignore]) for each in pixels]
    np.testing.assert_allclose(jaccard(maps, mask, 8, keep=keep, ignore=ignore), expected)


@pytest.mark.parametrize("seen", [(24, 40), (60, 90), (37, 51)])
def test_a_resized_pictures_patches_are_compared_at_the_masks_resolution(seen: tuple[int, int]):
    mask = disc(37, 51)
    maps = np.random.default_rng(0).random((2, -(-seen[0] // 8), -(-seen[1] // 8)))
    expected = []
    for weights in maps:
        kept = Image.fromarray(enlarged(mass_mask(weights, 0.6), 8, seen))
        large = np.asarray(kept.resize((51, 37), Image.Resampling.NEAREST))
        expected.append(jaccard_score(mask.ravel(), large.ravel()))
    np.testing.assert_allclose(jaccard(maps, mask, 8, input_size=seen), expected)


def test_jaccard_of_nothing_is_zero():
    nothing, something = np.zeros((1, 2, 2)), np.ones((1, 2, 2))
    empty, full = np.zeros((16, 16), bool), np.ones((16, 16), bool)
    assert jaccard(nothing, empty, 8).tolist() == jaccard(nothing, full, 8).tolist() == [0.0]
    assert jaccard(something, empty, 8).tolist() == jaccard(something, full, 8, ignore=full).tolist() == [0.0]
    assert jaccard(something, full, 8, keep=1).tolist() == [1.0]
    assert jaccard(something * np.nan, full, 8).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"has 2 x 2 patches of 8, got a map of 3 x 2"):
        jaccard(np.ones((1, 3, 2)), full, 8)


def test_a_picture_scores_the_mean_over_its_objects_of_the_best_head_for_each():
    left, right = np.zeros((16, 32), bool), np.zeros((16, 32), bool)
    left[:8, :8] = right[8:, 16:] = True
    layers = {"mean": np.ones((2, 4)), "head0": left[::8, ::8] + 0.0, "head2": right[::8, ::8] + 0.0}
    objects = Objects({"a": left, "b": right}, np.zeros((16, 32), bool))
    score = score_picture("x", layers, objects, 8, keep=1.0, input_size=(16, 32))
    assert (score.name, score.objects) == ("x", 2)
    assert score.values == {
        "best head": 1.0,
        "mean": pytest.approx((1 / 8 + 2 / 8) / 2),
        "head0": 0.5,
        "head2": 0.5,
        "whole picture": pytest.approx((1 / 8 + 2 / 8) / 2),
        "centred disc": pytest.approx(np.mean([disc_jaccard(left), disc_jaccard(right)])),
    }


def disc_jaccard(mask: np.ndarray) -> float:
    rows, cols = mask.shape
    by_distance = sorted(
        np.ndindex(mask.shape), key=lambda at: (at[0] - (rows - 1) / 2) ** 2 + (at[1] - (cols - 1) / 2) ** 2
    )
    drawn = np.zeros(mask.shape, bool)
    for at in by_distance[: mask.sum()]:
        drawn[at] = True
    return jaccard_score(mask.ravel(), drawn.ravel())


def test_pixels_that_nobody_judged_count_for_no_one():
    mask, void = disc(16, 32), np.zeros((16, 32), bool)
    void[:, 16:] = True
    map_ = np.random.default_rng(0).random((2, 4))
    both = score_picture("x", {"head0": map_}, Objects({"a": mask}, void), 8, input_size=(16, 32)).values
    kept = enlarged(mass_mask(map_, 0.6), 8, (16, 32))
    assert both["head0"] == pytest.approx(jaccard_score(mask[~void], kept[~void]))
    assert both["whole picture"] == pytest.approx(mask[~void].mean())


def test_without_single_heads_there_is_no_best_one():
    objects = Objects({"a": disc(16, 16)}, np.zeros((16, 16), bool))
    values = score_picture("x", {"mean": np.ones((2, 2))}, objects, 8, input_size=(16, 16)).values
    assert list(values) == ["mean", "whole picture", "centred disc"]
