"""What is looked at in each picture: attention of the chosen heads, and beside it features of the patches."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dino.attention.heads import HeadChoice, chosen_maps, parse_heads, pick_heads_by
from dino.attention.maps import attention_maps, check_block, patch_side
from dino.attention.patch_features import PrincipalColors, feature_at, patch_features, similarity
from dino.attention.render import ByteArray, FloatArray
from dino.runtime.backbones import NamedBackbone


@dataclass(eq=False)
class View:
    """A backbone and what is asked of it.

    Call `settle` with a few pictures first: heads may be chosen, and colours fitted, by what they show.

    Args:
        heads: as `heads.parse_heads` takes them.
        block, tile: see `maps.attention_maps`.
        similar_to: (x, y) in pixels of a point whose patch all others are compared with.
        pca: also the first three principal components of the patch features.

    Raises:
        UserError: the backbone has no class attention, or no such block or head.
    """

    named: NamedBackbone
    device: torch.device
    precision: str
    heads: str = "all"
    block: int = -1
    tile: int = 0
    similar_to: tuple[int, int] | None = None
    pca: bool = False
    patch_size: int = field(init=False)
    _choice: HeadChoice = field(init=False)
    _colors: PrincipalColors | None = field(init=False, default=None)
    _reference: FloatArray | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.patch_size = patch_side(self.named.network)
        check_block(self.named.network, self.block)
        self.named.network.to(self.device)
        smallest = np.zeros((1, 2 * self.patch_size, 2 * self.patch_size, 3), np.uint8)
        self._choice = parse_heads(self.heads, self.maps(smallest).shape[1])

    @property
    def unsettled(self) -> bool:
        """Whether something waits for `settle`."""
        return self._choice.auto or (self.pca and self._colors is None)

    def settle(self, samples: Sequence[ByteArray]) -> list[str]:
        """Choose heads and colours by what a few pictures show; sentences that say what was chosen."""
        said: list[str] = []
        if self._choice.auto:
            picked, how = pick_heads_by(samples, lambda image: self.maps(image[None])[0], self.patch_size)
            self._choice = self._choice.filled(picked)
            said.append(how)
        if self.pca:
            self._colors = PrincipalColors.fit([self._features(sample) for sample in samples])
        return said

    def take_mean_of_several(self) -> None:
        """Where several heads are chosen, and neither their mean nor their maximum, also take the mean."""
        choice = self._choice
        if len(choice.numbers) > 1 and not choice.maximum:
            self._choice = replace(choice, mean=True)

    def maps(self, images: ByteArray) -> FloatArray:
        """Attention of every head, (B, H, R, C), in pictures (B, rows, cols, 3) of one size."""
        return attention_maps(
            self.named.network,
            images,
            block=self.block,
            tile=self.tile,
            device=self.device,
            precision=self.precision,
        )

    def weights(self, maps_HRC: FloatArray) -> dict[str, FloatArray]:
        """Of one picture's heads those that were asked for, by name."""
        return chosen_maps(maps_HRC, self._choice)

    def features(self, image: ByteArray, *, follow: bool = False) -> dict[str, NDArray[np.float32]]:
        """What is no attention: `similarity` (R, C) in [0, 1], 0 at right angles or beyond; `pca` (R, C, 3).

        Args:
            follow: compare with the point's patch in the first picture that this was called with.

        Raises:
            UserError: the point is outside of the picture.
        """
        layers: dict[str, NDArray[np.float32]] = {}
        if self.similar_to is None and self._colors is None:
            return layers
        features_RCD = self._features(image)
        if self.similar_to is not None:
            if self._reference is None or not follow:
                x, y = self.similar_to
                self._reference = feature_at(features_RCD, (y, x), self.patch_size, image.shape[:2])
            layers["similarity"] = similarity(features_RCD, self._reference).clip(0, 1)
        if self._colors is not None:
            layers["pca"] = self._colors(features_RCD).astype(np.float32)
        return layers

    def names(self) -> list[str]:
        """Of the layers that a frame has, in order."""
        one = np.zeros((max(self._choice.numbers, default=0) + 1, 1, 1), np.float32)
        features = [("similarity", self.similar_to is not None), ("pca", self.pca)]
        return [*self.weights(one), *(name for name, asked in features if asked)]

    def frame_layers(self, images: ByteArray) -> list[dict[str, FloatArray]]:
        """Weights and features together, of each frame of a clip."""
        maps = self.maps(images)
        return [
            self.weights(maps_HRC) | self.features(image, follow=True)
            for image, maps_HRC in zip(images, maps, strict=True)
        ]

    def restart(self) -> None:
        """Before another clip: forget the point that was followed."""
        self._reference = None

    def _features(self, image: ByteArray) -> FloatArray:
        return patch_features(self.named.network, image, device=self.device, precision=self.precision)
