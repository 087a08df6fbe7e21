"""The score against a loop over pixels."""

import numpy as np
import pytest

from dino.attention.score import object_score


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
    with pytest.raises(ValueError, match=r"\(2, 2\) patches of 8, got maps \(1, 3, 2\)"):
        object_score(np.ones((1, 3, 2)), disc(16, 16), 8)
