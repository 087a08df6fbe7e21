"""Maps against masks of objects: Jaccard similarity with what attention keeps, and attention's mass on the object.

H heads (here: maps of any kind, in a stack), R and C rows and columns of patches.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.attention.ground_truth import Objects
from dino.attention.heads import FloatArray, head_number
from dino.attention.render import BoolArray, check_grid, mass_mask
from dino.attention.score_table import BEST, DISC, WHOLE, PictureScore


def jaccard(
    maps_HRC: NDArray[Any],
    mask: BoolArray,
    patch_size: int,
    *,
    keep: float = 0.6,
    ignore: BoolArray | None = None,
    input_size: tuple[int, int] | None = None,
) -> NDArray[np.float64]:
    """Intersection over union of the mask and of the patches that hold `keep` of a map's mass, per head (heads,).

    Pixels are those of the mask; each belongs to the patch that holds its centre. Where neither the mask nor the
    map has a pixel, it is 0, as in scikit-learn.

    Args:
        maps_HRC: weights (heads, rows, cols), one per patch.
        mask: (rows, cols), true on the object, over the whole picture at any resolution.
        patch_size: side of a patch in pixels of the network's input.
        keep: part of the mass, in [0, 1]; see `render.mass_mask`.
        ignore: (rows, cols), true where a pixel counts on neither side.
        input_size: (rows, cols) of the network's input, when that is not the mask's size.

    Raises:
        ValueError: there is not one weight per patch.
    """
    size = input_size or (mask.shape[0], mask.shape[1])
    check_grid(maps_HRC.shape[1:], patch_size, size)
    kept = mass_mask(maps_HRC, keep).reshape(len(maps_HRC), -1)
    row, col = (
        ((np.arange(pixels) + 0.5) * side / pixels).astype(int) // patch_size
        for pixels, side in zip(mask.shape, size, strict=True)
    )
    patch = row[:, None] * maps_HRC.shape[2] + col
    judged = np.ones(mask.shape, bool) if ignore is None else ~ignore
    pixels = np.bincount(patch[judged], minlength=kept.shape[1])
    on_object = np.bincount(patch[judged & mask], minlength=kept.shape[1])
    intersection = kept @ on_object
    union = kept @ pixels + on_object.sum() - intersection
    return np.asarray(intersection / np.maximum(union, 1))


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
    size = input_size or (mask.shape[0], mask.shape[1])
    weights = np.asarray(maps, np.float64)
    check_grid(weights.shape[1:], patch_size, size)
    if not mask.any():
        raise ValueError("the mask is empty: there is no object to score")
    over_rows, over_cols = (
        _overlap(patches, patch_size * pixels / side, pixels)
        for patches, pixels, side in zip(weights.shape[1:], mask.shape, size, strict=True)
    )
    visible = np.outer(over_rows.sum(axis=1), over_cols.sum(axis=1))
    on_object = (over_rows @ mask @ over_cols.T) / visible
    mass = weights.sum(axis=(1, 2))
    part = (weights * on_object).sum(axis=(1, 2)) / np.where(mass > 0, mass, 1.0)
    return np.asarray(part / mask.mean())


def _overlap(patches: int, side: float, pixels: int) -> NDArray[np.float64]:
    """Length that patch i, of that side, shares with pixel j: (patches, pixels)."""
    starts = np.arange(patches)[:, None] * side
    pixel = np.arange(pixels)[None]
    return np.clip(np.minimum(starts + side, pixel + 1) - np.maximum(starts, pixel), 0.0, 1.0)


def score_picture(
    name: str,
    layers: dict[str, FloatArray],
    objects: Objects,
    patch_size: int,
    *,
    keep: float = 0.6,
    input_size: tuple[int, int],
) -> PictureScore:
    """Jaccard similarity of each map, and of the masks that chance offers, with the objects of one picture.

    Args:
        layers: maps (rows, cols) by name, as `heads.chosen_maps` gives them; the best is sought among the heads.
        objects: at least one.
    """
    maps = np.stack(list(layers.values()))
    heads = [index for index, layer in enumerate(layers) if head_number(layer) is not None]
    judged = ~objects.void
    rows: list[dict[str, float]] = []
    for mask in objects.masks.values():
        similar = jaccard(
            maps, mask, patch_size, keep=keep, ignore=objects.void, input_size=input_size
        ).tolist()
        best = {BEST: max(similar[index] for index in heads)} if heads else {}
        disc = _disc(mask.shape, int(mask.sum())) & judged
        object_only = mask & judged
        chance = {
            WHOLE: float(object_only.sum() / max(judged.sum(), 1)),
            DISC: float((disc & mask).sum() / max((disc | object_only).sum(), 1)),
        }
        rows.append(best | dict(zip(layers, similar, strict=True)) | chance)
    return PictureScore(name, len(rows), {key: float(np.mean([row[key] for row in rows])) for key in rows[0]})


def _disc(size: tuple[int, ...], area: int) -> BoolArray:
    """The `area` pixels that are nearest to the middle."""
    row, col = (np.arange(side) - (side - 1) / 2 for side in size)
    distance = row[:, None] ** 2 + col**2
    nearest = np.zeros(distance.size, bool)
    nearest[np.argsort(distance, axis=None, kind="stable")[:area]] = True
    return nearest.reshape(distance.shape)
