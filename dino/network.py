"""Backbone and head over views of several sizes: one forward per size, and the head once on all of them.

V = views, B = images, C = channels, K = prototypes
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """Of a `MultiCropNetwork`, in the order of the views."""

    features_VBC: Tensor
    logits_VBK: Tensor


class MultiCropNetwork(nn.Module):
    """A list of V views (B, 3, H, W) -> backbone features and head logits for each.

    Views of equal height and width share one forward, and therefore their batch-norm statistics, as in DINO.
    """

    backbone: nn.Module
    head: nn.Module

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self._run = _run

    def compile(self, *args: Any, **options: Any) -> None:
        """From now on run backbone and head compiled (`torch.compile`), with a graph for each crop size.

        Copies of the network are not compiled, nor are its parts where they are called by themselves: in other modes
        or with other sizes they would be compiled again and again.
        """
        self._run = torch.compile(_run, *args, **{"dynamic": False, **options})

    @property
    def is_compiled(self) -> bool:
        return self._run is not _run

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": _run}

    def forward(self, views: Sequence[Tensor]) -> Output:
        of_size: dict[torch.Size, list[int]] = {}
        for index, view in enumerate(views):
            of_size.setdefault(view.shape[-2:], []).append(index)
        features: dict[int, Tensor] = {}
        for indices in of_size.values():
            batch = self._run(self.backbone, torch.cat([views[index] for index in indices]))
            features.update(zip(indices, batch.chunk(len(indices)), strict=True))
        all_features = torch.cat([features[index] for index in range(len(views))])
        shape = (len(views), -1)
        return Output(
            all_features.unflatten(0, shape), self._run(self.head, all_features).unflatten(0, shape)
        )


def _run(part: nn.Module, inputs: Tensor) -> Tensor:
    return part(inputs)
