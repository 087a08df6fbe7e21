"""Where each head's class token looks: maps of any backbone with class attention, for pictures of any size.

    maps = attention_maps(backbone, picture)        # (heads, rows, cols)
    large = enlarge(normalize(maps)[0], patch_side(backbone), (picture.height, picture.width))

H heads, R and C rows and columns of patches.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL.Image import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dino.runtime.backbones import class_attention, evaluating, has_class_attention
from dino.runtime.distributed import autocast
from dino.runtime.options import UserError


def attention_maps(
    backbone: nn.Module,
    image: Image | NDArray[np.uint8],
    *,
    image_size: int | tuple[int, int] | None = None,
    block: int = -1,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> NDArray[np.float32]:
    """The class token's weights on the patches of one picture, float32 (heads, rows, cols).

    The maps cover the whole picture: there are ceil(side / patch) patches along each side, and a last one
    that is not full hangs over the edge (`render.enlarge` cuts that off). The backbone is left as it was.

    Args:
        image: RGB, as a picture or as uint8 (rows, cols, 3).
        image_size: resize first; see `resize`.
        block: which class-attention block, for XCiT; -1 is the last.
        device: where the backbone is.
        precision: "fp32", "bf16" or "fp16", of the network's forward pass.

    Raises:
        UserError: the backbone has no class attention, or takes pictures of one other size only.
    """
    pixels = _normalized(resize(image, image_size))
    whole = _pad_to_whole_patches(backbone, pixels).to(device)
    # no_grad and not inference_mode: the backbone may cache what it computes here, and train with it later.
    with evaluating(backbone), torch.no_grad(), autocast(torch.device(device), precision):
        (maps_HRC,) = class_attention(backbone, whole[None], block)
    return maps_HRC.float().cpu().numpy()


def resize(image: Image | NDArray[np.uint8], image_size: int | tuple[int, int] | None) -> NDArray[np.uint8]:
    """The picture as uint8 (rows, cols, 3), resized by antialiased bicubic interpolation.

    Args:
        image_size: pixels of the short side, or (rows, cols) whatever its shape; None: its own size.
    """
    if image_size is not None:
        picture = transforms.to_pil_image(image) if isinstance(image, np.ndarray) else image
        size = [image_size] if isinstance(image_size, int) else list(image_size)
        image = transforms.resize(picture, size, InterpolationMode.BICUBIC, antialias=True)
    return np.array(image)


def patch_side(backbone: nn.Module) -> int:
    """Side in pixels of the patches that a backbone with class attention has.

    Raises:
        UserError: it has no class attention.
    """
    if not has_class_attention(backbone):
        raise UserError(
            f"{type(backbone).__name__} has no class attention to draw; XCiT and vision transformers with a "
            "class token have, such as --arch xcit_small_12_p16 or vit_small"
        )
    if isinstance(backbone, VisionTransformer):
        return int(backbone.patch_embed.patch_size[0])
    return int(cast(Any, backbone).patch_size)


def _normalized(pixels: NDArray[np.uint8]) -> Tensor:
    """float32 (3, rows, cols) with ImageNet's mean and standard deviation taken out."""
    return transforms.normalize(transforms.to_tensor(pixels), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _pad_to_whole_patches(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Repeat the last row and column until the sides are multiples of the patch: timm's ViTs take no others.

    XCiT's convolutional stem pads by itself, to the same grid.
    """
    side = patch_side(backbone)
    if not isinstance(backbone, VisionTransformer):
        return pixels
    rows, cols = pixels.shape[-2:]
    padded = F.pad(pixels[None], (0, -cols % side, 0, -rows % side), mode="replicate")[0]
    embedding = backbone.patch_embed
    if embedding.strict_img_size and tuple(padded.shape[-2:]) != tuple(embedding.img_size):
        only = " x ".join(map(str, embedding.img_size))
        raise UserError(
            f"this model takes pictures of {only} pixels only, got {rows} x {cols}; "
            f"add --image_size {only.replace(' x ', ' ')}"
        )
    return padded
