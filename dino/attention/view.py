"""What is looked at in each picture: attention of the chosen heads, and beside it features of the patches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dino.attention.heads import HeadChoice, chosen_maps, mirror_pair, parse_heads, pick_heads
from dino.attention.maps import attention_maps, check_block, check_tile, head_count, patch_side
from dino.attention.patch_features import PrincipalColors, feature_at, patch_features, similarity
from dino.attention.render import ByteArray, FloatArray
from dino.runtime.named_backbone import NamedBackbone
from dino.runtime.options import UserError
from xcit import XCiT

# Patches of each sample that colours are fitted to: more would change them by nothing to be seen.
_PATCHES_PER_SAMPLE = 20_000


class NoRoomError(UserError):
    """A picture too large for the memory; a smaller one may be looked at."""


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
        UserError: the backbone has no class attention, no such block or head, or cannot be tiled.
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
        check_tile(self.named.network, self.tile)
        self.named.network.to(self.device)
        self._choice = parse_heads(self.heads, self.head_count)

    @property
    def head_count(self) -> int:
        """Of all heads that the maps have."""
        return head_count(self.named.network, self.block)

    @property
    def unsettled(self) -> bool:
        """Whether something waits for `settle`."""
        return self._choice.auto or (self.pca and self._colors is None)

    @property
    def shows_single_heads(self) -> bool:
        """Whether heads are shown one by one, and not their mean or maximum only."""
        return self._choice.auto or bool(self._choice.numbers)

    @property
    def single_heads(self) -> tuple[int, ...]:
        """Numbers of the heads that are shown one by one, as far as they are settled."""
        return self._choice.numbers

    def settle(self, samples: Iterable[ByteArray]) -> list[str]:
        """Choose heads and colours by what a few pictures show; sentences that say what was chosen.

        Without a sample nothing is settled.
        """
        maps: list[FloatArray] = []
        mirrored_maps: list[FloatArray] = []
        features: list[FloatArray] = []
        for sample in samples:
            if self._choice.auto:
                whole, mirrored = mirror_pair(sample, self.patch_size)
                maps.append(self.maps(whole[None])[0])
                mirrored_maps.append(self.maps(mirrored[None])[0])
            if self.pca:
                features.append(_thinned(self._features(sample)))
        said: list[str] = []
        if maps:
            picked, how = pick_heads(maps, mirrored_maps)
            self._choice = self._choice.filled(picked)
            said.append(how)
        if features:
            self._colors = PrincipalColors.fit(features)
        return said

    def take_mean_of_several(self) -> None:
        """Where several heads are chosen, and neither their mean nor their maximum, also take the mean."""
        choice = self._choice
        if len(choice.numbers) > 1 and not choice.maximum:
            self._choice = replace(choice, mean=True)

    def maps(self, images: ByteArray) -> FloatArray:
        """Attention of every head, (B, H, R, C), in pictures (B, rows, cols, 3) of one size.

        Raises:
            NoRoomError: they are too large for the memory.
            UserError: the model takes pictures of one other size only.
        """
        with self._room_for(images.shape[1], images.shape[2]):
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
        """What is no attention: `similarity` (R, C) in [0, 1], 0 at right angles or beyond; `pca` (R, C, 3),
        RGB in [0, 255].

        Args:
            follow: compare with the point's patch in the first picture that this was called with.

        Raises:
            OutsideError: the point is outside of the picture.
            NoRoomError: the picture is too large for the memory.
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
        with self._room_for(image.shape[0], image.shape[1]):
            return patch_features(
                self.named.network, image, tile=self.tile, device=self.device, precision=self.precision
            )

    @contextmanager
    def _room_for(self, rows: int, cols: int) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if type(error) is RuntimeError and "can't allocate memory" not in str(error):
                raise
            parts = ", or see them in parts with --tile 1024" if isinstance(self.named.network, XCiT) else ""
            raise NoRoomError(
                f"the memory of {self.device} does not hold what the network makes of {cols} x {rows} pixels: limit "
                f"them with --image_size{parts}"
            ) from error


def _thinned(features_RCD: FloatArray) -> FloatArray:
    """Some of the patches, evenly taken, in one row."""
    patches_PD = features_RCD.reshape(-1, features_RCD.shape[-1])
    return patches_PD[:: -(-len(patches_PD) // _PATCHES_PER_SAMPLE)].copy()[None]
