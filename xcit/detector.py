"""Mask R-CNN on the pyramid (XCiT, section 4.3): boxes, classes and masks of the objects in a picture.

    model = MaskRCNN(xcit.create_pyramid("xcit_small_12_p16"), num_classes=80).eval()
    found = model([picture])[0]    # boxes, labels, scores, masks
    mask = paste_mask(found["masks"][0], found["boxes"][0], height, width)

Anchors, levels, thresholds and parameters are those of the published models (mmdetection 2.11), which therefore give
the detections that they were published with. Training differs in three points, where torchvision's heads are used:
boxes are regressed with a smooth L1 loss (beta 1/9) for an L1 loss, a mask's targets are not rounded to 0 and 1, and
an object's best anchor is trained on however little the two overlap.

K classes, numbered from 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from xcit.detector_heads import CHANNELS, BoxPredictor, MaskPredictor, RegionHeads, region_heads
from xcit.pyramid import STRIDES, Pyramid

_ANCHOR_SCALE = 8  # side of an anchor's square, in strides
_ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height by width

_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
_MASK_THRESHOLD = 0.5


class MaskRCNN(GeneralizedRCNN):
    """Pictures, a list of (3, H, W) in [0, 1] of any sizes, to their objects; in training, to losses.

    In eval mode, a dict per picture, of the most certain first: `boxes` (N, 4) as x0, y0, x1, y1 in the picture's
    pixels, `labels` (N,) in 0..K-1, `scores` (N,) and `masks` (N, 28, 28), probabilities within the box: see
    `paste_mask`. In training mode, a dict of scalar losses whose sum is to be minimised; targets are a dict per
    picture of `boxes` (N, 4) float32, not empty, `labels` (N,) int64 in 0..K-1 and `masks` (N, H, W) uint8.

    Args:
        num_classes: K.
        short_side: in pixels, that a picture is resized to in eval mode; in training it is taken as it is.
        long_side: in pixels, that the other side is kept to.
        regions: of a picture that the box head is trained on, a quarter of them on objects.
        score_threshold: below which nothing is detected, in [0, 1].
        detections: at most so many of a picture.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        *,
        short_side: int = 800,
        long_side: int = 1333,
        regions: int = 512,
        score_threshold: float = 0.05,
        detections: int = 100,
    ) -> None:
        super().__init__(
            _Levels(pyramid),
            _proposals(),
            region_heads(num_classes, regions, score_threshold, detections),
            _Resized(short_side, long_side),
        )
        self.num_classes = num_classes

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None) -> Any:
        if targets is None:
            found = super().forward(list(images))
            return [{**each, "labels": each["labels"] - 1} for each in found]
        # torchvision counts the background as class 0.
        return super().forward(list(images), [{**each, "labels": each["labels"] + 1} for each in targets])

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh last layers, of boxes and of masks, for other classes."""
        heads = cast(RegionHeads, self.roi_heads)
        like = next(heads.parameters())
        heads.box_predictor = BoxPredictor(num_classes).to(like)
        heads.mask_predictor = MaskPredictor(num_classes).to(like)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute each block of the backbone in the backward pass."""
        cast(_Levels, self.backbone).pyramid.trunk.set_grad_checkpointing(enable)


def paste_mask(probabilities: Tensor, box: Tensor, height: int, width: int) -> Tensor:
    """One object's mask in its picture: bool (height, width), on the CPU.

    Args:
        probabilities: (rows, cols), spread over the box and interpolated between their centres.
        box: x0, y0, x1, y1 in pixels.
    """
    mask = torch.zeros((height, width), dtype=torch.bool)
    x0, y0, x1, y1 = box.float().tolist()
    left, right = max(int(x0), 0), min(int(x1) + 1, width)
    top, bottom = max(int(y0), 0), min(int(y1) + 1, height)
    if left >= right or top >= bottom or x1 <= x0 or y1 <= y0:
        return mask
    cols = (torch.arange(left, right) + 0.5 - x0) / (x1 - x0) * 2 - 1
    rows = (torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * 2 - 1
    # Each axis by itself would be faster, and its rounding another than that of the published models.
    grid = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), dim=-1)
    values = F.grid_sample(probabilities.float().cpu()[None, None], grid[None], align_corners=False)[0, 0]
    mask[top:bottom, left:right] = values >= _MASK_THRESHOLD
    return mask


class _Levels(nn.Module):
    """Images (B, 3, H, W) to five maps (B, 256, H/s, W/s), s from 4 to 64, by their names."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(
            [pyramid.channels] * len(STRIDES), CHANNELS, extra_blocks=LastLevelMaxPool()
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(images)
        return cast(dict[str, Tensor], self.fpn({str(level): each for level, each in enumerate(maps)}))


class Anchors(nn.Module):
    """Boxes around the points of every level, (rows * cols * 3, 4) per picture, in fractions of pixels.

    torchvision's own are rounded to pixels, and their strides to what divides the picture.
    """

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = [
            anchors_of_level(each.shape[-2], each.shape[-1], STRIDES[0] * 2**level, each.device)
            for level, each in enumerate(maps)
        ]
        return [torch.cat(levels)] * len(images.image_sizes)


def anchors_of_level(rows: int, cols: int, stride: int, device: torch.device) -> Tensor:
    """Of a map (rows, cols): (rows * cols * 3, 4), point by point, as x0, y0, x1, y1 in pixels."""
    ratios = torch.tensor(_ANCHOR_RATIOS, device=device)
    heights = _ANCHOR_SCALE * stride * ratios.sqrt()
    widths = _ANCHOR_SCALE * stride / ratios.sqrt()
    around_zero = torch.stack((-widths, -heights, widths, heights), dim=1) / 2
    y, x = torch.meshgrid(
        torch.arange(rows, device=device) * stride, torch.arange(cols, device=device) * stride, indexing="ij"
    )
    points = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    return (points + around_zero).reshape(-1, 4)


class _ProposalHead(RPNHead):
    """In float32: under autocast neither coordinates nor the order of the scores would survive."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, boxes = super().forward(maps)
        return [each.float() for each in scores], [each.float() for each in boxes]


def _proposals() -> RegionProposalNetwork:
    return RegionProposalNetwork(
        Anchors(),
        _ProposalHead(CHANNELS, len(_ANCHOR_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )


class _Resized(GeneralizedRCNNTransform):
    """Normalised and padded to whole patches of the coarsest level; in eval mode resized, and boxes back again."""

    def __init__(self, short_side: int, long_side: int) -> None:
        super().__init__(short_side, long_side, _MEAN, _STD, size_divisible=STRIDES[-1])

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if self.training:
            return image, target
        height, width = image.shape[-2:]
        scale = min(self.min_size[0] / min(height, width), self.max_size / max(height, width))
        size = [max(int(side * scale + 0.5), 1) for side in (height, width)]
        # Without antialiasing, as the published models were measured.
        return F.interpolate(image[None], size=size, mode="bilinear")[0], target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Masks stay as they are: pasted, those of a large picture would take gigabytes."""
        if self.training:
            return result
        return [
            {
                **each,
                "boxes": resize_boxes(each["boxes"], list(resized), list(original)),
                "masks": each["masks"][:, 0],
            }
            for each, resized, original in zip(result, image_shapes, original_image_sizes, strict=True)
        ]
