"""What Mask R-CNN does with regions: their features, classes, boxes and masks; under the published parameters' shapes.

K classes; R regions.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import roi_align

from xcit.pyramid import STRIDES

CHANNELS = 256  # of every level and of the mask head
_HIDDEN = 1024  # of the box head
_BOX_SIDE, _MASK_SIDE = 7, 14  # that regions are pooled to

_COARSEST_OF_FINEST = 56  # side in pixels up to twice which a region is pooled from the finest level


class RegionHeads(RoIHeads):
    """torchvision's, but for what masks are trained on, which is half a pixel beside there: too far for small ones."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return cast(
                tuple[list[dict[str, Tensor]], dict[str, Tensor]],
                super().forward(features, proposals, image_shapes),
            )
        assert targets is not None
        regions, objects, labels, codes = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, regions, image_shapes)
        of_class, of_box = fastrcnn_loss(*self.box_predictor(self.box_head(pooled)), labels, codes)
        positive = [each > 0 for each in labels]
        regions, objects, labels = (
            [each[kept] for each, kept in zip(some, positive, strict=True)]
            for some in (regions, objects, labels)
        )
        pooled = self.mask_roi_pool(features, regions, image_shapes)
        of_mask = mask_loss(
            self.mask_predictor(self.mask_head(pooled)),
            torch.cat(labels),
            [each["masks"] for each in targets],
            regions,
            objects,
        )
        return [], {"loss_classifier": of_class, "loss_box_reg": of_box, "loss_mask": of_mask}


def mask_loss(
    logits: Tensor,
    labels: Tensor,
    masks: Sequence[Tensor],
    regions: Sequence[Tensor],
    objects: Sequence[Tensor],
) -> Tensor:
    """Mean binary cross-entropy of the regions' maps for their own classes.

    Args:
        logits: (R, K, rows, cols) over the regions.
        labels: (R,), which of the K.
        masks: (N, H, W) of each picture's objects, 0 or 1.
        regions: (n, 4) of each picture, x0, y0, x1, y1 in pixels; R in all.
        objects: (n,) of each picture, which of its objects.
    """
    if not len(labels):
        return logits.sum() * 0
    wanted = torch.cat(
        [mask_targets(*each, logits.shape[-1]) for each in zip(masks, regions, objects, strict=True)]
    )
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, wanted)


def mask_targets(masks: Tensor, regions: Tensor, objects: Tensor, side: int) -> Tensor:
    """The part of an object's mask within a region, (n, side, side) in [0, 1]: see `mask_loss`."""
    if not len(regions):
        return masks.new_zeros((0, side, side), dtype=torch.float32)
    numbered = torch.cat([objects[:, None].to(regions), regions], dim=1)
    return cast(Tensor, roi_align(masks[:, None].float(), numbered, side, aligned=True)[:, 0])


class PooledRegions(nn.Module):
    """Regions' features, (R, C, side, side), each from the level that suits its size.

    torchvision's own shifts them by half a pixel of the map, and takes as many samples of every region.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(
        self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Of `boxes`, (N, 4) in pixels of the padded pictures, one tensor per picture."""
        pictures = [torch.full_like(each[:, :1], number) for number, each in enumerate(boxes)]
        regions = torch.cat([torch.cat(pictures), torch.cat(list(boxes))], dim=1)
        levels = level_of(regions[:, 1:])
        parts = []
        for level, stride in enumerate(STRIDES):
            # In float32: half precision has no numbers for the coordinates of a large picture.
            part = roi_align(
                maps[str(level)].float(),
                regions[levels == level],
                self.side,
                spatial_scale=1 / stride,
                sampling_ratio=0,
                aligned=True,
            )
            parts.append(part.to(maps[str(level)].dtype))
        # By level they lie in the order of a stable sort, whose inverse brings each to its place.
        return torch.cat(parts)[levels.argsort(stable=True).argsort()]


def level_of(boxes: Tensor) -> Tensor:
    """Number of the level, from 0, that each of the boxes (R, 4) is pooled from: twice the side, one higher."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = (sides / _COARSEST_OF_FINEST + 1e-6).log2().floor()
    return level.clamp(0, len(STRIDES) - 1).long()


class BoxPredictor(nn.Module):
    """As torchvision wants it, the background first and with a box, from what is published, where it is last."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(_HIDDEN, num_classes + 1)
        self.bbox_pred = nn.Linear(_HIDDEN, 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.cls_score(features).float()
        return scores.roll(1, dims=1), F.pad(self.bbox_pred(features).float(), (4, 0))


class _MaskHead(nn.Module):
    """(R, C, 14, 14) to (R, C, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(4))
        self.upsampling = nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2)
        for layer in (*self.convolutions, self.upsampling):
            _init_for_relu(cast(nn.Conv2d, layer))

    def forward(self, features: Tensor) -> Tensor:
        for layer in (*self.convolutions, self.upsampling):
            features = F.relu(layer(features), inplace=True)
        return features


class MaskPredictor(nn.Module):
    """A map for every class, and for torchvision an empty one for the background before them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.mask_fcn_logits = nn.Conv2d(CHANNELS, num_classes, 1)
        _init_for_relu(self.mask_fcn_logits)

    def forward(self, features: Tensor) -> Tensor:
        return F.pad(self.mask_fcn_logits(features).float(), (0, 0, 0, 0, 1, 0))


def _init_for_relu(layer: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(cast(Tensor, layer.bias))


def region_heads(num_classes: int, regions: int, score_threshold: float, detections: int) -> RegionHeads:
    """With random weights; see `detector.MaskRCNN`."""
    return RegionHeads(
        PooledRegions(_BOX_SIDE),
        TwoMLPHead(CHANNELS * _BOX_SIDE**2, _HIDDEN),
        BoxPredictor(num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=regions,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=score_threshold,
        nms_thresh=0.5,
        detections_per_img=detections,
        mask_roi_pool=PooledRegions(_MASK_SIDE),
        mask_head=_MaskHead(),
        mask_predictor=MaskPredictor(num_classes),
    )
