"""Where each head's class token looks: maps of any backbone with class attention, for pictures of any size.

    (maps,) = attention_maps(backbone, picture[None])        # (heads, rows, cols)
    heated = heat_patches(normalize(maps)[0], patch_side(backbone), picture.shape[:2])

B pictures, H heads, R and C rows and columns of patches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL.Image import Image, Resampling, fromarray
from torch import Tensor, nn

from dino.runtime.backbones import check_class_attention, class_attention, evaluating, is_vit
from dino.runtime.distributed import autocast
from dino.runtime.images import IMAGENET_MEAN, IMAGENET_STD, MAX_PIXELS
from dino.runtime.options import UserError
from xcit import XCiT

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

# Patches that a tile is shown of its neighbours: local patch interaction looks this far, less and less.
_MARGIN = 8


def attention_maps(
    backbone: nn.Module,
    images: NDArray[np.uint8],
    *,
    block: int = -1,
    tile: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> NDArray[np.float32]:
    """The class token's weights on the patches, float32 (B, heads, rows, cols).

    The maps cover the whole pictures: there are ceil(side / patch) patches along each side, and a last one
    that is not full hangs over the edge (`render.enlarge` cuts that off). The backbone is left as it was.

    Args:
        images: RGB, uint8 (B, rows, cols, 3).
        block: which class-attention block of XCiT, or which block of a ViT; -1 is the last.
        tile: side in pixels of the parts that XCiT's patch tokens are computed in, for pictures too large for
            the memory; 0: in one. The class token then looks at the tokens of all parts at once, but the
            cross-covariance attention of each part has seen that part and its margin only.
        device: where the backbone is.
        precision: "fp32", "bf16" or "fp16", of the network's forward pass.

    Raises:
        UserError: the backbone has no class attention, no such block, cannot be tiled, or takes pictures of one
            other size only.
    """
    check_block(backbone, block)
    # no_grad and not inference_mode: the backbone may cache what it computes here, and train with it later.
    with evaluating(backbone), torch.no_grad(), autocast(torch.device(device), precision):
        if tile and max(images.shape[1:3]) > tile:
            patches_BRCD = tiled_patches(backbone, images, tile, device)
            maps_BHRC = cast(XCiT, backbone).attention_to(patches_BRCD, block)
        else:
            maps_BHRC = class_attention(backbone, prepare(backbone, images, device), block)
    return maps_BHRC.float().cpu().numpy()


def resize(image: Image | NDArray[np.uint8], image_size: int | tuple[int, int] | None) -> NDArray[np.uint8]:
    """The picture as uint8 (rows, cols, 3), resized by antialiased bicubic interpolation.

    Args:
        image_size: pixels of the short side, or (rows, cols) whatever its shape; None: its own size.

    Raises:
        UserError: the size is larger than pictures may be.
    """
    if image_size is None:
        return np.array(image)
    picture = fromarray(image) if isinstance(image, np.ndarray) else image
    rows, cols = _resized(picture.size, image_size)
    if rows * cols > MAX_PIXELS:
        raise UserError(
            f"a picture of {picture.width} x {picture.height} pixels resized to {cols} x {rows} would have "
            f"{rows * cols / 1e6:.0f} Mpx, the limit is {MAX_PIXELS / 1e6:.0f} Mpx: name a smaller --image_size"
        )
    return np.array(picture.resize((cols, rows), Resampling.BICUBIC))


def _resized(size: tuple[int, int], image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of a picture of (width, height); the long side is cut to whole pixels, as by torchvision."""
    if not isinstance(image_size, int):
        return image_size
    width, height = size
    long = int(image_size * max(size) / min(size))
    return (image_size, long) if height <= width else (long, image_size)


def patch_side(backbone: nn.Module) -> int:
    """Side in pixels of the patches that a backbone with class attention has.

    Raises:
        UserError: it has no class attention.
    """
    check_class_attention(backbone)
    if is_vit(backbone):
        return int(backbone.patch_embed.feat_ratio())  # with a convolutional stem, more than its patch_size
    return int(cast(Any, backbone).patch_size)


def head_count(backbone: nn.Module, block: int = -1) -> int:
    """How many heads the maps of a block have."""
    if is_vit(backbone):
        return int(cast(Any, backbone).blocks[block].attn.num_heads)
    return int(cast(Any, backbone).num_heads)


def check_block(backbone: nn.Module, block: int) -> None:
    """Refuse a block that the backbone does not have.

    Raises:
        UserError: it has no such block, or no class attention at all.
    """
    patch_side(backbone)
    blocks = len(cast(Any, backbone).blocks if is_vit(backbone) else _class_blocks(backbone))
    if not -blocks <= block < blocks:
        raise UserError(
            f"--block {block}: this model has {blocks} blocks whose class token attends, 0 to {blocks - 1}; "
            "-1 is the last"
        )


def check_tile(backbone: nn.Module, tile: int) -> None:
    """Refuse tiles, of so many pixels (0: none), that the backbone's tokens cannot be computed in.

    Raises:
        UserError: it is no XCiT, or they hold no patch.
    """
    if not tile:
        return
    if not isinstance(backbone, XCiT):
        raise UserError("--tile is for XCiT, whose tokens are computed locally; a ViT takes --image_size")
    if tile < backbone.patch_size:
        raise UserError(f"--tile {tile}: a tile holds at least one patch of {backbone.patch_size} pixels")


def prepare(backbone: nn.Module, images: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """What the backbone is shown of pictures (B, rows, cols, 3): float32 (B, 3, rows, cols) on the device.

    ImageNet's mean and standard deviation are taken out. timm's ViTs take whole patches only: for them the last
    row and column are repeated up to a multiple of the patch. XCiT's convolutions pad by themselves, to the same
    grid.

    Raises:
        UserError: the backbone takes pictures of one other size only.
    """
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"])).to(device).permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] * 255 for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    # In place: of a large picture even one more copy counts.
    whole = pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)
    return _pad_to_whole_patches(backbone, whole) if is_vit(backbone) else whole


def _class_blocks(backbone: nn.Module) -> nn.ModuleList:
    return cast(nn.ModuleList, cast(Any, backbone).cls_attn_blocks)


def _pad_to_whole_patches(backbone: "VisionTransformer", pixels: Tensor) -> Tensor:
    side = patch_side(backbone)
    rows, cols = pixels.shape[-2:]
    padded = F.pad(pixels, (0, -cols % side, 0, -rows % side), mode="replicate")
    embedding = backbone.patch_embed
    if embedding.strict_img_size and tuple(padded.shape[-2:]) != tuple(embedding.img_size):
        only = " x ".join(map(str, embedding.img_size))
        raise UserError(
            f"this model takes pictures of {only} pixels only, got {rows} x {cols}; "
            f"add --image_size {only.replace(' x ', ' ')}"
        )
    return padded


@dataclass(frozen=True)
class _Tile:
    """Along one side, in patches: what is shown, and of that what is kept."""

    start: int
    stop: int
    shown_from: int
    shown_to: int

    @property
    def within(self) -> slice:
        return slice(self.start - self.shown_from, self.stop - self.shown_from)


def _tiles(patches: int, patches_per_tile: int) -> Iterator[_Tile]:
    for start in range(0, patches, patches_per_tile):
        stop = min(start + patches_per_tile, patches)
        yield _Tile(start, stop, max(0, start - _MARGIN), min(patches, stop + _MARGIN))


def tiled_patches(
    backbone: nn.Module, images: NDArray[np.uint8], tile: int, device: torch.device | str = "cpu"
) -> Tensor:
    """What `XCiT.forward_patches` gives of pictures (B, rows, cols, 3), computed in tiles: (B, R, C, D).

    For `tile` see `attention_maps`.

    Raises:
        UserError: the backbone is no XCiT, or a tile holds no patch.
    """
    check_tile(backbone, tile)
    assert isinstance(backbone, XCiT)
    side = backbone.patch_size
    grid = (-(-images.shape[1] // side), -(-images.shape[2] // side))
    bands: list[Tensor] = []
    for rows in _tiles(grid[0], tile // side):
        parts: list[Tensor] = []
        for cols in _tiles(grid[1], tile // side):
            shown = images[
                :,
                rows.shown_from * side : rows.shown_to * side,
                cols.shown_from * side : cols.shown_to * side,
            ]
            corner = (rows.shown_from, cols.shown_from)
            patches = backbone.forward_patches(prepare(backbone, shown, device), grid=grid, corner=corner)
            parts.append(patches[:, rows.within, cols.within].clone())
        bands.append(torch.cat(parts, dim=2))
    return torch.cat(bands, dim=1)
