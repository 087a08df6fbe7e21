"""Feature maps at strides 4, 8, 16 and 32 from intermediate blocks, for detection and segmentation (XCiT, section 4.3).

pyramid = xcit.create_pyramid("xcit_small_12_p16", weights="dino_xcit_small_12_p16")
maps = pyramid(images)    # four maps, (B, C, H/4, W/4) to (B, C, H/32, W/32)
"""

from torch import Tensor, nn

from xcit.trunk import Trunk

STRIDES = (4, 8, 16, 32)

# Of the depth, at which the levels are taken: after blocks 4, 6, 8 and 12 of 12, and 8, 12, 16 and 24 of 24.
_DEPTHS = (1 / 3, 1 / 2, 2 / 3, 1)


class Pyramid(nn.Module):
    """Images (B, 3, H, W) to four maps (B, C, H/s, W/s), s in `STRIDES`, of as many channels as the trunk has.

    H and W are multiples of the coarsest stride; others are rounded up to whole patches and then, where patches are
    pooled, down. The tokens are taken from the residual stream as they are, without a norm.

    Attributes:
        channels: C.
        blocks: number, from 0, of the block after which each level is taken.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.channels = trunk.embed_dim
        depth = len(trunk.blocks)
        self.blocks = [max(round(depth * share), 1) - 1 for share in _DEPTHS]
        # The names are those of the published weights.
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = (
            _resampling(stride, trunk.patch_size, self.channels) for stride in STRIDES
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raises ValueError for images that are smaller than the coarsest stride."""
        if min(images.shape[-2:]) < STRIDES[-1]:
            raise ValueError(
                f"images must be {STRIDES[-1]} pixels or more on a side, got {tuple(images.shape)}"
            )
        maps = self.trunk.feature_maps(images, self.blocks)
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [resample(tokens) for resample, tokens in zip(levels, maps, strict=True)]


def _resampling(stride: int, patch_size: int, channels: int) -> nn.Module:
    """From patches to a stride: transposed convolutions to come to a finer one, max pooling to a coarser one."""
    if stride > patch_size:
        pooled = stride // patch_size
        return nn.MaxPool2d(pooled, pooled)
    if stride == patch_size:
        return nn.Identity()
    if 2 * stride == patch_size:
        return nn.Sequential(nn.ConvTranspose2d(channels, channels, 2, stride=2))
    assert 4 * stride == patch_size, (stride, patch_size)
    return nn.Sequential(
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
        nn.BatchNorm2d(channels),
        nn.GELU(),
        nn.ConvTranspose2d(channels, channels, 2, stride=2),
    )
