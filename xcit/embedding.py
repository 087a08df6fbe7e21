"""Pixels to tokens: convolutional patch embedding and Fourier position encoding (XCiT, section 4)."""

import math
from collections import OrderedDict
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from xcit.linear import is_traced

# Stride-2 convolutions per patch size; each one also doubles the channels, up to the embedding's width.
_STAGES = {8: 3, 16: 4}

# Above this many pixels an image that is only looked at is embedded in bands of about so many.
_BAND_PIXELS = 1 << 21


class PatchEmbedding(nn.Module):
    """Stack of 3x3 convolutions of stride 2: (B, in_chans, H, W) -> (B, embed_dim, ceil(H/p), ceil(W/p)).

    Args:
        patch_size: p, 8 or 16 pixels.
        embed_dim: channels of a token.

    Raises:
        ValueError: the patch size is neither 8 nor 16.
    """

    def __init__(self, *, patch_size: int, embed_dim: int, in_chans: int = 3) -> None:
        super().__init__()
        if patch_size not in _STAGES:
            raise ValueError(f"patch size must be 8 or 16, got {patch_size}; see xcit.list_models()")
        stages = _STAGES[patch_size]
        widths = [in_chans, *(embed_dim >> (stages - 1 - stage) for stage in range(stages))]
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            convolution = nn.Conv2d(narrow, wide, kernel_size=3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(wide)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])  # no activation after the last stage

    def forward(self, images: Tensor) -> Tensor:
        rows, cols = images.shape[-2:]
        if images.device.type == "cpu" and not is_traced():
            # The convolutions' faster layout there, and the tokens' own.
            images = images.contiguous(memory_format=torch.channels_last)
        looks_only = not (self.training or torch.is_grad_enabled())
        if looks_only and not is_traced() and rows * cols > _BAND_PIXELS:
            return self._forward_in_bands(images)
        return self.proj(images)

    def _forward_in_bands(self, images: Tensor) -> Tensor:
        """The same from some rows at a time: of a large image, the first stages take more memory than all else."""
        stages: list[nn.Sequential] = [layer for layer in self.proj if isinstance(layer, nn.Sequential)]
        heights = [images.shape[-2]]
        for _ in stages:
            heights.append((heights[-1] + 1) // 2)
        band = max(1, (_BAND_PIXELS // images.shape[-1]) >> len(stages))
        bands = [
            self._band(images, stages, heights, first, min(first + band, heights[-1]))
            for first in range(0, heights[-1], band)
        ]
        return torch.cat(bands, dim=-2)

    @staticmethod
    def _band(
        images: Tensor, stages: list[nn.Sequential], heights: list[int], first: int, last: int
    ) -> Tensor:
        """Rows `first` to `last` of the embedding. A stage's row r is made of the rows 2r - 1 to 2r + 1 before it."""
        needed = [(first, last)]
        for height in reversed(heights[:-1]):
            above, below = needed[0]
            needed.insert(0, (max(0, 2 * above - 1), min(height, 2 * below)))
        x = images[..., needed[0][0] : needed[0][1], :]
        for index, (stage, (above, below)) in enumerate(zip(stages, needed[1:], strict=True)):
            x = nn.functional.gelu(x) if index else x
            edges = (0, 0, int(2 * above - 1 < 0), int(2 * below > heights[index]))
            convolution, norm = cast(tuple[nn.Conv2d, nn.Module], tuple(stage))
            padded = nn.functional.pad(x, edges)
            x = norm(nn.functional.conv2d(padded, convolution.weight, stride=2, padding=(0, 1)))
        return x


class FourierPosition(nn.Module):
    """Sine and cosine features of a token's row and column, projected to the token's width.

    Positions are relative to the grid's sides, so that any resolution works without interpolation.
    """

    FREQUENCIES = 16
    LONGEST_PERIOD = 10_000.0

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        # A sine and a cosine per frequency, for rows and for columns.
        self.token_projection = nn.Conv2d(4 * self.FREQUENCIES, embed_dim, kernel_size=1)

    def forward(
        self, rows: int, cols: int, *, grid: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """Position encoding of a grid: (1, embed_dim, rows, cols), to be broadcast over images.

        Args:
            grid: (rows, cols) of the larger grid that this is a part of; None: it is whole.
            corner: (row, col) in that grid where the part begins.
        """
        weight = self.token_projection.weight
        features = _cached_features(rows, cols, weight.device, grid, corner)
        # Features stay float32 until here: half precision cannot tell large positions apart.
        return self.token_projection(features.to(weight.dtype))


def fourier_features(
    rows: int,
    cols: int,
    device: torch.device,
    grid: tuple[int, int] | None = None,
    corner: tuple[int, int] = (0, 0),
) -> Tensor:
    """Unprojected position features, float32 (1, 64, rows, cols): those of the row, then of the column.

    For `grid` and `corner` see `FourierPosition.forward`.
    """
    grid = grid or (rows, cols)
    by_row = _axis_features(grid[0], device)[:, corner[0] : corner[0] + rows, None].expand(-1, -1, cols)
    by_col = _axis_features(grid[1], device)[:, None, corner[1] : corner[1] + cols].expand(-1, rows, -1)
    return torch.cat([by_row, by_col])[None]


def _axis_features(length: int, device: torch.device) -> Tensor:
    """sin and cos, interleaved, of positions 1..length scaled to (0, 2 pi]: (2 * frequencies, length)."""
    count = FourierPosition.FREQUENCIES
    positions = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    positions = positions / (positions[-1:] + 1e-6) * (2 * math.pi)
    exponents = torch.arange(count, dtype=torch.float32, device=device) / count
    angles = positions / FourierPosition.LONGEST_PERIOD ** exponents[:, None]
    return torch.stack([angles.sin(), angles.cos()], dim=1).flatten(0, 1)


# Shared by all models of the process, and outside of them, so that copies and pickles do not carry it.
_cache: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_CACHE_SIZE = 4  # multi-crop training alternates between two sizes; large grids take many megabytes


def _cached_features(
    rows: int,
    cols: int,
    device: torch.device,
    grid: tuple[int, int] | None = None,
    corner: tuple[int, int] = (0, 0),
) -> Tensor:
    if is_traced():
        # part of the graph, so that it holds for any size
        return fourier_features(rows, cols, device, grid, corner)
    key = (rows, cols, device, grid, corner)
    features = _cache.pop(key, None)
    if features is None:
        # A tensor made in inference mode could not be used for training later.
        with torch.inference_mode(False), torch.no_grad():
            features = fourier_features(rows, cols, device, grid, corner)
    _cache[key] = features
    while len(_cache) > _CACHE_SIZE:
        _cache.popitem(last=False)
    return features
