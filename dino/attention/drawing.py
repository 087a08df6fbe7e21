"""One picture's layers in the styles that a user asks for: heat, overlay, contour, mask, colours, cut-out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino.attention.heads import head_number
from dino.attention.marks import AttentionOverlay, ContourOverlay, HeadColors, MaskOverlay, cut_out
from dino.attention.render import (
    ByteArray,
    FloatArray,
    enlarge_colors,
    heat_patches,
    mass_mask,
    save_heat_png,
    save_png,
)

STYLES = ("heat", "overlay", "contour", "mask", "colors", "cutout")

# Of a file's name, before the layer's; heat and masks are called as by DINO's script.
_PREFIXES = {"heat": "attn", "overlay": "overlay", "contour": "contour"}


@dataclass(frozen=True)
class Picture:
    """What is known of one picture or frame.

    Args:
        image: (rows, cols, 3) uint8 RGB as the network saw it.
        weights: raw maps (R, C) by name, as `heads.chosen_maps` gives them.
        scaled: the same on [0, 1].
        features: what is no attention and has its own names: `similarity` (R, C) in [0, 1], `pca` (R, C, 3),
            RGB in [0, 255].
    """

    image: ByteArray
    weights: Mapping[str, FloatArray]
    scaled: Mapping[str, FloatArray]
    features: Mapping[str, Any]

    @property
    def heads(self) -> dict[int, FloatArray]:
        """The single heads among the maps, by number."""
        numbered = {head_number(name): weights for name, weights in self.weights.items()}
        return {head: weights for head, weights in numbered.items() if head is not None}


@dataclass(frozen=True)
class Look:
    """How layers are drawn.

    Args:
        patch_size: side of a patch in pixels.
        opacity: of overlays, in [0, 1].
        smooth: interpolate between patches.
        threshold: part of the attention's mass that masks, cut-outs and colours keep, in [0, 1].
    """

    patch_size: int
    colormap: str = "inferno"
    opacity: float = 0.6
    smooth: bool = False
    threshold: float = 0.6

    def panel(self, style: str, name: str, picture: Picture) -> ByteArray:
        """One layer in one style: (rows, cols, 3), or with alpha for `cutout`.

        What is no attention has no mass to keep, and is drawn as heat or in its own colours whatever the style.
        `colors` is of all single heads, at least one, whatever the name.
        """
        image = picture.image
        if style == "colors":
            heads = picture.heads
            return HeadColors(self.threshold)(image, np.stack([*heads.values()]), self.patch_size, [*heads])
        if name in picture.features:
            return self._feature(style, name, picture)
        weights, scaled = picture.weights[name], picture.scaled[name]
        if style == "heat":
            return self._heat(scaled, image)
        if style == "overlay":
            return self._overlay(scaled, image)
        if style == "contour":
            return ContourOverlay()(image, weights, self.patch_size)
        kept = mass_mask(weights, self.threshold)
        if style == "mask":
            return MaskOverlay()(image, kept, self.patch_size)
        assert style == "cutout", style
        return cut_out(image, kept, self.patch_size)

    def save(self, folder: Path, styles: tuple[str, ...], picture: Picture) -> list[str]:
        """Write a picture's files, one after the other; their names.

        Raises:
            UserError: one cannot be written.
        """
        names: list[str] = []
        for file, style, name in self._files(styles, picture):
            if style == "heat" and name in picture.scaled:
                size = (picture.image.shape[0], picture.image.shape[1])
                save_heat_png(
                    picture.scaled[name],
                    self.patch_size,
                    size,
                    folder / file,
                    colormap=self.colormap,
                    smooth=self.smooth,
                )
            else:
                save_png(self.panel(style, name, picture), folder / file)
            names.append(file)
        return names

    def _files(self, styles: tuple[str, ...], picture: Picture) -> Iterator[tuple[str, str, str]]:
        """Name of each file, and the style and layer in it."""
        for style in styles:
            if style == "colors":
                yield "colors.png", style, ""
            else:
                yield from ((f"{self._prefix(style)}{name}.png", style, name) for name in picture.weights)
        yield from ((f"{name}.png", "heat", name) for name in picture.features)

    def _prefix(self, style: str) -> str:
        return f"{style}_th{self.threshold}_" if style in ("mask", "cutout") else f"{_PREFIXES[style]}-"

    def _feature(self, style: str, name: str, picture: Picture) -> ByteArray:
        values, size = picture.features[name], picture.image.shape[:2]
        if values.ndim == 3:
            return enlarge_colors(values, self.patch_size, size)
        return (
            self._overlay(values, picture.image) if style == "overlay" else self._heat(values, picture.image)
        )

    def _heat(self, scaled: FloatArray, image: ByteArray) -> ByteArray:
        size = (image.shape[0], image.shape[1])
        return heat_patches(scaled, self.patch_size, size, colormap=self.colormap, smooth=self.smooth)

    def _overlay(self, scaled: FloatArray, image: ByteArray) -> ByteArray:
        return AttentionOverlay(self.colormap, self.opacity, self.smooth)(image, scaled, self.patch_size)
