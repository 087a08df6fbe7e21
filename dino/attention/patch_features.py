"""Pictures of patch features: their likeness to one patch, and their principal components as colours.

This is not attention: it shows what the backbone tells apart, not where its class token looks.

    features = patch_features(backbone, image)                                       # (R, C, D)
    likeness = similarity(features, feature_at(features, (120, 300), patch_side(backbone)))
    colors = PrincipalColors.fit([features])(features)                               # (R, C, 3)

R and C rows and columns of patches, D channels, P patches, K principal components.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dino.attention.maps import patch_side, prepare, tiled_patches
from dino.runtime.backbones import evaluating, tokens
from dino.runtime.distributed import autocast
from dino.runtime.options import UserError
from xcit import XCiT

FloatArray = NDArray[np.float32]

# The parts of the patches, in percent, that a colour's darkest and brightest level are left to.
_TAILS = (1.0, 99.0)

# A component that spreads less than this part of the features' size is the rounding of float32.
_ROUNDING = 1e-5

_MIDDLE = 0.5


class OutsideError(UserError):
    """A point that a picture does not have; another may."""


def patch_features(
    backbone: nn.Module,
    image: NDArray[np.uint8],
    *,
    tile: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> FloatArray:
    """The patch tokens of one picture after the final norm, float32 (R, C, D).

    The grid is that of `attention_maps`: it covers the whole picture. The backbone is left as it was.

    Args:
        image: RGB, uint8 (rows, cols, 3).
        tile: as for `attention_maps`.
        device: where the backbone is.
        precision: "fp32", "bf16" or "fp16", of the network's forward pass.

    Raises:
        UserError: the backbone has no class attention beside which they could be drawn, cannot be tiled, or takes
            pictures of one other size only.
    """
    side = patch_side(backbone)
    with evaluating(backbone), torch.no_grad(), autocast(torch.device(device), precision):
        if tile and max(image.shape[:2]) > tile:
            patches = tiled_patches(backbone, image[None], tile, device)
            tokens_BPD = cast(XCiT, backbone).features_of(patches)[:, 1:]
        else:
            _, tokens_BPD = tokens(backbone, prepare(backbone, image[None], device))
    rows, cols = (-(-length // side) for length in image.shape[:2])
    return tokens_BPD[0].float().reshape(rows, cols, -1).cpu().numpy()


def similarity(features_RCD: NDArray[Any], reference_D: NDArray[Any]) -> FloatArray:
    """Cosine of every patch's feature with a reference, float32 (R, C) in [-1, 1]; 0 where either is zero."""
    lengths_RC = np.linalg.norm(features_RCD, axis=-1) * np.linalg.norm(reference_D)
    cosine_RC = (features_RCD @ reference_D) / np.where(lengths_RC > 0, lengths_RC, 1)
    return np.clip(cosine_RC, -1, 1).astype(np.float32)


def feature_at(
    features_RCD: NDArray[Any],
    point: tuple[int, int],
    patch_size: int,
    size: tuple[int, int] | None = None,
) -> NDArray[Any]:
    """The feature (D,) of the patch that a pixel lies in.

    Args:
        point: (row, col) in pixels from the top left corner, each from 0.
        patch_size: side of a patch in pixels.
        size: (rows, cols) of the picture; None: it ends where its patches end.

    Raises:
        OutsideError: the point lies outside of the picture.
    """
    rows, cols = size or (side * patch_size for side in features_RCD.shape[:2])
    row, col = point
    if not (0 <= row < rows and 0 <= col < cols):
        raise OutsideError(
            f"the point {col} {row} lies outside of the picture of {cols} x {rows} pixels: its x is between 0 and "
            f"{cols - 1}, its y between 0 and {rows - 1}"
        )
    return np.asarray(features_RCD[row // patch_size, col // patch_size])


@dataclass(frozen=True, eq=False)
class PrincipalColors:
    """The first three principal components of patch features as red, green and blue.

    Fitted once, on a picture or on frames of a clip, and then applied: what has one colour in one frame has it in
    all. The sign of each component is such that its largest weight is positive. A component that the features do
    not have (fewer than three channels or patches, or no spread) is drawn at half its brightness.

    Attributes:
        mean: (D,).
        components: (K, D), each of length 1; K is 3 or less.
        limits: (2, K), the projections that are shown darkest and brightest: the first and the last percent of
            those fitted lie beyond and are clipped.
    """

    mean: FloatArray
    components: FloatArray
    limits: FloatArray

    @classmethod
    def fit(cls, features: Sequence[NDArray[Any]]) -> "PrincipalColors":
        """From features (R, C, D) of one picture or several, whose R and C may differ; all are held at once.

        Raises:
            ValueError: there are none.
        """
        if not features:
            raise ValueError("principal components need the features of at least one picture")
        grids = [grid.reshape(-1, grid.shape[-1]) for grid in features]
        patches_PD = np.concatenate(grids, dtype=np.float32)
        mean_D = patches_PD.mean(axis=0, dtype=np.float64).astype(np.float32)
        rounding = _ROUNDING * np.abs(patches_PD).max()
        patches_PD -= mean_D
        components_KD = _components(patches_PD, rounding)
        limits_2K = np.percentile(patches_PD @ components_KD.T, _TAILS, axis=0)
        return cls(mean_D, components_KD, limits_2K.astype(np.float32))

    def __call__(self, features_RCD: NDArray[Any]) -> NDArray[np.uint8]:
        """RGB of every patch, uint8 (R, C, 3); see `enlarge_colors` for pixels."""
        low_K, high_K = self.limits
        projected_RCK = (np.asarray(features_RCD, np.float32) - self.mean) @ self.components.T
        colors_RC3 = np.full((*features_RCD.shape[:2], 3), _MIDDLE, np.float32)
        contrast_K = np.where(high_K > low_K, high_K - low_K, 1)
        colors_RC3[..., : len(self.components)] = (projected_RCK - low_K) / contrast_K
        return np.round(255 * np.clip(colors_RC3, 0, 1)).astype(np.uint8)


def _components(centred_PD: FloatArray, rounding: float) -> FloatArray:
    """The first three, or as many as spread by more than `rounding`."""
    if np.abs(centred_PD).max() <= rounding:  # where nothing varies, scikit-learn divides by zero
        return np.empty((0, centred_PD.shape[1]), np.float32)
    from sklearn.decomposition import PCA  # takes a second, and few pictures are drawn in these colours

    found = PCA(min(3, *centred_PD.shape), svd_solver="covariance_eigh").fit(centred_PD)
    # Not by found.explained_variance_: those are squares, and the largest one's rounding hides the small ones.
    components_KD = found.components_[(centred_PD @ found.components_.T).std(axis=0) > rounding]
    largest_K1 = np.abs(components_KD).argmax(axis=1)[:, None]
    signs_K1 = np.sign(np.take_along_axis(components_KD, largest_K1, axis=1))
    return np.asarray(components_KD * signs_K1, np.float32)
