"""Distortions of many views at once, on the device that trains; the workers only decode and crop.

Who is distorted how is known on the host, so that each operation sees only the views that it is for, and the host
never waits for the device. Letters: N = views of one size, H, W = their rows and columns.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dino.distortions import (
    BLUR_REACH,
    BRIGHTNESS,
    CONTRAST,
    HUE,
    HUES,
    LUMA,
    ORDERS,
    SATURATION,
    SOLARIZE_THRESHOLD,
    Distortion,
    blur_kernels,
    normalised,
)
from dino.loader import Batch

# Of views (N, 3, H, W), floats in [0, 255], and their rows of the table; what comes out is clipped and cut off.
Operation: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Columns of the table after the fields of a `Distortion`: the blur's weights from the middle outwards, and for each
# the sum of those further out.
_WEIGHTS = slice(len(Distortion._fields), len(Distortion._fields) + BLUR_REACH + 1)
_BEYOND = slice(_WEIGHTS.stop, _WEIGHTS.stop + BLUR_REACH + 1)

_ROUND = 0.5  # for operations that Pillow rounds instead of cutting off
_SMALLEST_RANGE = 1e-3  # between the channels of a pixel: of a grey one any hue is right


class OnDevice:
    """A batch -> its views (B, 3, H, W), float32, distorted as drawn, and normalised, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[Tensor]:
        views = [_send(view, self.device) for view in batch.views]
        if batch.distortions is None:
            return [normalised(view) for view in views]
        finished: dict[int, Tensor] = {}
        for size in dict.fromkeys(view.shape[-1] for view in views):
            places = [place for place, view in enumerate(views) if view.shape[-1] == size]
            distortions = torch.cat([batch.distortions[:, place] for place in places])
            distorted = distort(torch.cat([views[place] for place in places]), distortions)
            finished.update(zip(places, normalised(distorted).chunk(len(places)), strict=True))
        return [finished[place] for place in range(len(views))]


def distort(views_N3HW: Tensor, distortions: Tensor) -> Tensor:
    """Views, square, uint8 RGB -> the same views, distorted: a new tensor, whose planes lie together.

    Args:
        distortions: (N, fields of a `Distortion`) float32, on the CPU whatever the device.
    """
    views = views_N3HW.clone(memory_format=torch.contiguous_format)
    steps = [(operation, at) for operation, at in _steps(distortions) if len(at)]
    if not steps:
        return views
    table = _send(_table(distortions), views.device)
    whom = _send(torch.cat([at for _, at in steps]), views.device).split([len(at) for _, at in steps])
    for (operation, _), at in zip(steps, whom, strict=True):
        changed = operation(views.index_select(0, at).float(), table.index_select(0, at))
        views.index_copy_(0, at, changed.clamp_(0, 255).to(torch.uint8))
    return views


def _steps(distortions: Tensor) -> Iterator[tuple[Operation, Tensor]]:
    """Operations in the order in which they are applied, and which views each is for."""
    of = dict(zip(Distortion._fields, distortions.unbind(1), strict=True))
    orders = torch.tensor(ORDERS)[of["order"].long()]
    changed = {
        BRIGHTNESS: of["brightness"] != 1,
        CONTRAST: of["contrast"] != 1,
        SATURATION: of["saturation"] != 1,
        HUE: of["hue"] != 0,
    }
    for place in range(len(changed)):
        for number, operation in _JITTER.items():
            yield operation, _numbers((orders[:, place] == number) & changed[number])
    yield _without_colour, _numbers(of["grayscale"] > 0)
    yield _blurred, _numbers(of["blur"] > 0)
    yield _solarized, _numbers(of["solarize"] > 0)


def _numbers(holds: Tensor) -> Tensor:
    return holds.nonzero().squeeze(1)


def _table(distortions: Tensor) -> Tensor:
    weights = blur_kernels(distortions[:, Distortion._fields.index("blur")].double().numpy())
    beyond = weights.sum(axis=1, keepdims=True) - np.cumsum(weights, axis=1)
    return torch.cat([distortions, torch.from_numpy(np.hstack([weights, beyond])).float()], dim=1)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # from other memory the host would wait
    return tensor.to(device, non_blocking=True)


def _column(rows: Tensor, name: str) -> Tensor:
    return rows[:, Distortion._fields.index(name), None, None, None]


def _brightened(views: Tensor, rows: Tensor) -> Tensor:
    return views * _column(rows, "brightness")


def _contrasted(views: Tensor, rows: Tensor) -> Tensor:
    mean = (_luma(views.mean((2, 3), keepdim=True)) + _ROUND).floor()
    return torch.lerp(mean, views, _column(rows, "contrast"))


def _saturated(views: Tensor, rows: Tensor) -> Tensor:
    return torch.lerp(_luma(views), views, _column(rows, "saturation"))


def _with_hue_turned(views: Tensor, rows: Tensor) -> Tensor:
    """Within its hexagon of colours, in which brightest and darkest channel stay what they are."""
    steps = (_column(rows, "hue") * (HUES - 1)).trunc()
    value, brightest = views.max(1, keepdim=True)
    span = value - views.amin(1, keepdim=True)
    differences = (views.roll(-1, 1) - views.roll(-2, 1)) / span.clamp(min=_SMALLEST_RANGE)
    hue = differences.gather(1, brightest) + 2 * brightest + 6 / HUES * steps
    from_hue = torch.arange(5, 0, -2, device=views.device).view(3, 1, 1)  # where each channel begins to fall
    sector = (hue + from_hue).remainder(6)
    return value - span * torch.minimum(sector, 4 - sector).clamp_(0, 1) + _ROUND


def _without_colour(views: Tensor, rows: Tensor) -> Tensor:
    return (_luma(views) + _ROUND).expand_as(views).clone()


def _blurred(views: Tensor, rows: Tensor) -> Tensor:
    """By products with banded matrices, one for each view, whose first and last column stand for all beyond."""
    side = views.shape[-1]
    place = torch.arange(side, device=views.device)
    away = (place[:, None] - place).abs().clamp_(max=BLUR_REACH + 1)
    weights = torch.nn.functional.pad(rows[:, _WEIGHTS], (0, 1))
    bands = weights.index_select(1, away.flatten()).unflatten(1, away.shape)
    outside = rows[:, _BEYOND].index_select(1, place.clamp(max=BLUR_REACH))
    bands[:, :, 0] += outside
    bands[:, :, -1] += outside.flip(1)
    return torch.einsum("nij,ncjk,nlk->ncil", bands, views, bands) + _ROUND


def _solarized(views: Tensor, rows: Tensor) -> Tensor:
    return torch.where(views < SOLARIZE_THRESHOLD, views, 255 - views)


def _luma(views: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W)."""
    red, green, blue = (plane * weight for plane, weight in zip(views.split(1, dim=1), LUMA, strict=True))
    return red + green + blue


_JITTER: dict[int, Operation] = {
    BRIGHTNESS: _brightened,
    CONTRAST: _contrasted,
    SATURATION: _saturated,
    HUE: _with_hue_turned,
}
