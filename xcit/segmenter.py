"""Semantic segmentation on the pyramid: Semantic FPN and UPerNet, as published for XCiT (section 4.3).

segmenter = SemanticFPN(xcit.create_pyramid("xcit_small_12_p16"), num_classes=150)
classes = segmenter.eval()(images).logits.argmax(dim=1)    # (B, H, W)

B images, K classes, L levels of the pyramid.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from xcit.pyramid import STRIDES, Pyramid

IGNORED = 255  # number of the pixels that nobody has judged

_DROPOUT = 0.1  # of whole channels, before the classifier
_POOLED = (1, 2, 3, 6)  # cells on a side that UPerNet pools the coarsest map to
_AUXILIARY_LEVEL = 2
_AUXILIARY_WEIGHT = 0.4
_CLASSIFIER_STD = 0.01


class Logits(NamedTuple):
    """What a segmenter gives, in every mode.

    Attributes:
        logits: (B, K, H, W).
        auxiliary: of the head that only training has, for its loss, (B, K, H, W); None in eval mode and for networks
            without such a head.
    """

    logits: Tensor
    auxiliary: Tensor | None


class Segmenter(nn.Module):
    """Normalised images (B, 3, H, W), of any H and W, to logits of K classes for every pixel.

    Images are padded with zeros to multiples of the coarsest stride, at the bottom and on the right; positions are
    those in the padded image, and the logits are cut to the image.
    """

    def __init__(self, pyramid: Pyramid, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
        self.pyramid = pyramid
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Logits:
        """Logits at the size of the images."""
        maps_L = self.pyramid(_padded(images))
        auxiliary = self._auxiliary(maps_L) if self.training else None
        size = images.shape[-2:]
        return Logits(
            _enlarged(self._decode(maps_L), STRIDES[0], size),
            None if auxiliary is None else _enlarged(auxiliary, STRIDES[_AUXILIARY_LEVEL], size),
        )

    def coarse(self, images: Tensor) -> Tensor:
        """Logits as the head computes them, at the finest stride of the padded images: (B, K, rows, cols)."""
        return self._decode(self.pyramid(_padded(images)))

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer, of every head, for other classes."""
        self.num_classes = num_classes
        for part in self.children():
            if isinstance(part, _Head):
                part.reset_classifier(num_classes)

    def _decode(self, maps_L: list[Tensor]) -> Tensor:
        """Logits at the finest level."""
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def _auxiliary(self, maps_L: list[Tensor]) -> Tensor | None:
        """Logits at `_AUXILIARY_LEVEL`."""
        return None


class SemanticFPN(Segmenter):
    """A feature pyramid network, each level brought to the finest by convolutions, and their sum (Kirillov, 2019).

    Args:
        pyramid: where the maps come from; the feature pyramid network has as many channels.
        num_classes: K.
        channels: of the head.
    """

    def __init__(self, pyramid: Pyramid, num_classes: int, *, channels: int = 128) -> None:
        super().__init__(pyramid, num_classes)
        width = pyramid.channels
        self.neck = FeaturePyramidNetwork([width] * len(STRIDES), width)
        self.decode_head = _FPNHead(width, channels, num_classes)

    def _decode(self, maps_L: list[Tensor]) -> Tensor:
        levels = self.neck(OrderedDict((str(number), level) for number, level in enumerate(maps_L)))
        return self.decode_head(list(levels.values()))


class UPerNet(Segmenter):
    """Pyramid pooling of the coarsest map, a top-down path, and all levels together (Xiao, 2018).

    In training a second, small head on the third map has a loss of its own.

    Args:
        pyramid: where the maps come from.
        num_classes: K.
        channels: of the head.
        auxiliary_channels: of the second head.
    """

    def __init__(
        self, pyramid: Pyramid, num_classes: int, *, channels: int = 512, auxiliary_channels: int = 256
    ) -> None:
        super().__init__(pyramid, num_classes)
        self.decode_head = _UPerHead(pyramid.channels, channels, num_classes)
        self.auxiliary_head = _FCNHead(pyramid.channels, auxiliary_channels, num_classes)

    def _decode(self, maps_L: list[Tensor]) -> Tensor:
        return self.decode_head(maps_L)

    def _auxiliary(self, maps_L: list[Tensor]) -> Tensor:
        return self.auxiliary_head(maps_L[_AUXILIARY_LEVEL])


class _Head(nn.Module):
    """What all heads end with; the names of their parts are those of the published weights."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(_DROPOUT)
        self.conv_seg = _classifier(channels, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.conv_seg = _classifier(self.conv_seg.in_channels, num_classes).to(self.conv_seg.weight)

    def classify(self, features: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(features))


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=_CLASSIFIER_STD)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class _FPNHead(_Head):
    def __init__(self, width: int, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.scale_heads = nn.ModuleList(_to_the_finest(stride, width, channels) for stride in STRIDES)

    def forward(self, levels: list[Tensor]) -> Tensor:
        together = self.scale_heads[0](levels[0])
        for enlarge, level in zip(list(self.scale_heads)[1:], levels[1:], strict=True):
            together = together + enlarge(level)
        return self.classify(together)


class _UPerHead(_Head):
    def __init__(self, width: int, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        finer = len(STRIDES) - 1
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), _convolution(width, channels, 1)) for cells in _POOLED
        )
        self.bottleneck = _convolution(width + len(_POOLED) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_convolution(width, channels, 1) for _ in range(finer))
        self.fpn_convs = nn.ModuleList(_convolution(channels, channels, 3) for _ in range(finer))
        self.fpn_bottleneck = _convolution(len(STRIDES) * channels, channels, 3)

    def forward(self, maps_L: list[Tensor]) -> Tensor:
        *finer, coarsest = maps_L
        pooled = [_resized(pool(coarsest), coarsest) for pool in self.psp_modules]
        level = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        refined = [level]
        for number in reversed(range(len(finer))):
            lateral = self.lateral_convs[number](finer[number])
            level = lateral + _resized(level, lateral)
            refined.insert(0, self.fpn_convs[number](level))
        together = torch.cat([_resized(each, refined[0]) for each in refined], dim=1)
        return self.classify(self.fpn_bottleneck(together))


class _FCNHead(_Head):
    def __init__(self, width: int, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.convs = nn.Sequential(_convolution(width, channels, 3))

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.convs(features))


# By the names that commands and files give them.
HEADS: dict[str, type[SemanticFPN] | type[UPerNet]] = {"fpn": SemanticFPN, "upernet": UPerNet}


def segmentation_losses(output: Logits, targets: Tensor, *, ignored: int = IGNORED) -> dict[str, Tensor]:
    """Scalars whose sum is to be minimised: the cross-entropy per judged pixel, the auxiliary one by its weight.

    Args:
        output: (B, K, h, w); brought to the size of the targets where it differs.
        targets: (B, H, W) int64 in [0, K), or `ignored`. Where all are ignored, the losses are 0.
    """
    losses = {"loss_seg": _cross_entropy(output.logits, targets, ignored)}
    if output.auxiliary is not None:
        losses["loss_aux"] = _AUXILIARY_WEIGHT * _cross_entropy(output.auxiliary, targets, ignored)
    return losses


def _cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    if logits.shape[-2:] != targets.shape[-2:]:
        logits = F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="sum")
    # At least 1: a batch in which nothing is judged has no loss, and no NaN.
    return total / (targets != ignored).sum().clamp(min=1)


def _padded(images: Tensor) -> Tensor:
    bottom, right = (-side % STRIDES[-1] for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def _enlarged(logits: Tensor, stride: int, size: torch.Size) -> Tensor:
    """From a level to the padded image, cut to the image's (rows, cols)."""
    large = F.interpolate(logits, scale_factor=stride, mode="bilinear", align_corners=False)
    return large[..., : size[0], : size[1]]


def _resized(level: Tensor, like: Tensor) -> Tensor:
    if level.shape[-2:] == like.shape[-2:]:
        return level
    return F.interpolate(level, like.shape[-2:], mode="bilinear", align_corners=False)


def _to_the_finest(stride: int, width: int, channels: int) -> nn.Sequential:
    """Convolutions, with a doubling of the map after each as long as it is coarser than the finest."""
    layers: list[nn.Module] = []
    while not layers or stride > STRIDES[0]:
        layers.append(_convolution(channels if layers else width, channels, 3))
        if stride > STRIDES[0]:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        stride //= 2
    return nn.Sequential(*layers)


def _convolution(channels_in: int, channels: int, side: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU, under the names of the published weights."""
    conv = nn.Conv2d(channels_in, channels, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=conv, bn=nn.BatchNorm2d(channels), activate=nn.ReLU()
    )
    return nn.Sequential(parts)
