"""Does attention find the object? Numbers for maps with a ground-truth mask beside them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def object_score(
    maps: NDArray[Any],
    mask: NDArray[np.bool_],
    patch_size: int,
    *,
    input_size: tuple[int, int] | None = None,
) -> NDArray[np.float64]:
    """Attention mass on the object over the object's part of the area, per head (heads,): 1 is chance.

    The mask is averaged over the area of each patch: a patch's weight lies evenly on what it shows of the
    picture. Scores range from 0 to the reciprocal of the object's part of the area; a map without mass has 0.

    Args:
        maps: weights (heads, rows, cols), one per patch; their sum does not matter.
        mask: (rows, cols), true on the object, over the whole picture at any resolution.
        patch_size: side of a patch in pixels of the network's input.
        input_size: (rows, cols) of the network's input, when that is not the mask's size.

    Raises:
        ValueError: the mask is empty, or there is not one weight per patch.
    """
    size = input_size or mask.shape
    weights = np.asarray(maps, np.float64)
    grid = tuple(-(-side // patch_size) for side in size)
    if weights.shape[1:] != grid:
        raise ValueError(f"an input of {size} has {grid} patches of {patch_size}, got maps {weights.shape}")
    if not mask.any():
        raise ValueError("the mask is empty: there is no object to score")
    over_rows, over_cols = (
        _overlap(patches, patch_size * pixels / side, pixels)
        for patches, pixels, side in zip(grid, mask.shape, size, strict=True)
    )
    visible = np.outer(over_rows.sum(axis=1), over_cols.sum(axis=1))
    on_object = (over_rows @ mask @ over_cols.T) / visible
    mass = weights.sum(axis=(1, 2))
    part = (weights * on_object).sum(axis=(1, 2)) / np.where(mass > 0, mass, 1.0)
    return part / mask.mean()


def _overlap(patches: int, side: float, pixels: int) -> NDArray[np.float64]:
    """Length that patch i, of that side, shares with pixel j: (patches, pixels)."""
    starts = np.arange(patches)[:, None] * side
    pixel = np.arange(pixels)[None]
    return np.clip(np.minimum(starts + side, pixel + 1) - np.maximum(starts, pixel), 0.0, 1.0)
