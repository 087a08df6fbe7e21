"""What a detector is trained on in a step, and how its losses come of it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dino.downstream.detection.coco import CocoSet
from dino.downstream.detection.views import DetectionViews

Content = tuple[list[Tensor], list[dict[str, Tensor]]]


class TrainingSample:
    """A view of a picture, (3, H, W) uint8, and what is to be found in it."""

    def __init__(self, pictures: CocoSet, views: DetectionViews) -> None:
        self.pictures = pictures
        self.views = views

    def __call__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        view, objects = self.views(*self.pictures.read(index))
        return torch.from_numpy(view).movedim(-1, 0), {
            name: torch.from_numpy(values) for name, values in objects._asdict().items()
        }


def collate(samples: list[tuple[Tensor, dict[str, Tensor]]]) -> Content:
    return [pixels for pixels, _ in samples], [targets for _, targets in samples]


def losses_of(network: nn.Module, content: Content, *, device: torch.device) -> Mapping[str, Tensor]:
    images = [as_image(pixels.to(device, non_blocking=True)) for pixels in content[0]]
    targets = [
        {name: value.to(device, non_blocking=True) for name, value in each.items()} for each in content[1]
    ]
    found: Mapping[str, Tensor] = network(images, targets)
    return found


def as_image(pixels: Tensor) -> Tensor:
    """Bytes (3, H, W) to float32 in [0, 1], which lies as torch wants it."""
    return pixels.contiguous().float().div_(255)
