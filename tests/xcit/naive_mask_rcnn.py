"""Mask R-CNN's detections from feature maps and tensors under mmdetection's names, in plain loops: an oracle.

Written from the published configuration: FPN, one anchor scale of 8 strides, boxes coded by their centres, regions
pooled with aligned RoIAlign, the background last among the classes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms, roi_align

State = dict[str, Tensor]

STRIDES = (4, 8, 16, 32, 64)


class Detections(NamedTuple):
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor


def convolved(state: State, name: str, values: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(values, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def linear(state: State, name: str, values: Tensor) -> Tensor:
    return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def levels_of(state: State, maps: list[Tensor]) -> list[Tensor]:
    merged = [convolved(state, f"neck.lateral_convs.{level}.conv", each) for level, each in enumerate(maps)]
    for level in (2, 1, 0):
        finer = merged[level].shape[-2:]
        merged[level] = merged[level] + F.interpolate(merged[level + 1], size=finer, mode="nearest")
    levels = [convolved(state, f"neck.fpn_convs.{level}.conv", each) for level, each in enumerate(merged)]
    return [*levels, levels[-1][:, :, ::2, ::2]]


def decoded(
    box: list[float], delta: list[float], stds: tuple[float, ...], size: tuple[int, int]
) -> list[float]:
    x0, y0, x1, y1 = box
    width, height = x1 - x0, y1 - y0
    dx, dy, dw, dh = (value * std for value, std in zip(delta, stds, strict=True))
    limit = abs(math.log(16 / 1000))
    across = width * math.exp(min(max(dw, -limit), limit))
    down = height * math.exp(min(max(dh, -limit), limit))
    x, y = x0 + width / 2 + dx * width, y0 + height / 2 + dy * height
    corners = (
        (x - across / 2, size[1]),
        (y - down / 2, size[0]),
        (x + across / 2, size[1]),
        (y + down / 2, size[0]),
    )
    return [min(max(value, 0.0), float(most)) for value, most in corners]


def proposals_of(state: State, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The thousand best of all levels, after suppression within each: (N, 4)."""
    boxes, scores = [], []
    for stride, level in zip(STRIDES, levels, strict=True):
        hidden = F.relu(convolved(state, "rpn_head.rpn_conv", level))
        objectness = convolved(state, "rpn_head.rpn_cls", hidden)[0].sigmoid()
        deltas = convolved(state, "rpn_head.rpn_reg", hidden)[0]
        found, certain = [], []
        for row in range(level.shape[2]):
            for col in range(level.shape[3]):
                for number, ratio in enumerate((0.5, 1.0, 2.0)):
                    across, down = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                    x, y = col * stride, row * stride
                    anchor = [x - across / 2, y - down / 2, x + across / 2, y + down / 2]
                    delta = deltas[4 * number : 4 * number + 4, row, col].tolist()
                    found.append(decoded(anchor, delta, (1, 1, 1, 1), size))
                    certain.append(objectness[number, row, col])
        best = torch.stack(certain).argsort(descending=True)[:1000]
        of_level, of_scores = torch.tensor(found)[best], torch.stack(certain)[best]
        kept = nms(of_level, of_scores, 0.7)
        boxes.append(of_level[kept])
        scores.append(of_scores[kept])
    order = torch.cat(scores).argsort(descending=True)[:1000]
    return torch.cat(boxes)[order]


def pooled(levels: list[Tensor], boxes: Tensor, side: int) -> Tensor:
    parts = []
    for box in boxes:
        size = math.sqrt(float((box[2] - box[0]) * (box[3] - box[1])))
        level = min(max(math.floor(math.log2(size / 56 + 1e-6)), 0), 3)
        parts.append(roi_align(levels[level], [box[None]], side, 1 / STRIDES[level], 0, aligned=True))
    return torch.cat(parts)


def detections(
    state: State, maps: list[Tensor], size: tuple[int, int], *, threshold: float, most: int = 100
) -> Detections:
    """Of one padded picture; `size` is its height and width without the padding."""
    levels = levels_of(state, maps)
    proposals = proposals_of(state, levels, size)
    hidden = pooled(levels, proposals, 7).flatten(1)
    for number in (0, 1):
        hidden = F.relu(linear(state, f"roi_head.bbox_head.shared_fcs.{number}", hidden))
    scores = linear(state, "roi_head.bbox_head.fc_cls", hidden).softmax(dim=1)
    deltas = linear(state, "roi_head.bbox_head.fc_reg", hidden)
    boxes, labels, certain = [], [], []
    for label in range(scores.shape[1] - 1):
        of_class = torch.tensor(
            [
                decoded(box, delta, (0.1, 0.1, 0.2, 0.2), size)
                for box, delta in zip(
                    proposals.tolist(), deltas[:, 4 * label : 4 * label + 4].tolist(), strict=True
                )
            ]
        )
        good = scores[:, label] > threshold
        kept = nms(of_class[good], scores[good, label], 0.5)
        boxes.append(of_class[good][kept])
        certain.append(scores[good, label][kept])
        labels.append(torch.full((len(kept),), label))
    order = torch.cat(certain).argsort(descending=True)[:most]
    found, names = torch.cat(boxes)[order], torch.cat(labels)[order]
    hidden = pooled(levels, found, 14)
    for number in range(4):
        hidden = F.relu(convolved(state, f"roi_head.mask_head.convs.{number}.conv", hidden))
    name = "roi_head.mask_head.upsample"
    hidden = F.relu(F.conv_transpose2d(hidden, state[f"{name}.weight"], state[f"{name}.bias"], stride=2))
    logits = convolved(state, "roi_head.mask_head.conv_logits", hidden)
    masks = torch.stack([logits[place, label] for place, label in enumerate(names.tolist())]).sigmoid()
    return Detections(found, names, torch.cat(certain)[order], masks)
