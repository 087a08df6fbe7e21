"""DINO's linear classifier on a frozen backbone: what it is given, how it is read and written, how it is scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino.evaluation.extraction import Extractor
from dino.evaluation.imagenet import NUM_CLASSES, imagenet_numbers
from dino.evaluation.labelled_sets import class_numbers
from dino.evaluation.scoring import balanced_accuracy
from dino.runtime import distributed
from dino.runtime.backbones import evaluating, last_blocks, reads_blocks, tokens
from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures
from xcit.weights import WeightsError, read_checkpoint, resolve

_INITIAL_DEVIATION = 0.01
_WRAPPED = "module."  # of DistributedDataParallel, in the files of DINO


@dataclass(frozen=True)
class ProbedTokens:
    """What the classifier is given; both apply to ViTs only, other backbones give their one feature.

    Attributes:
        blocks: class tokens of so many last blocks, side by side.
        patch_mean: the mean of the patch tokens too.
    """

    blocks: int = 4
    patch_mean: bool = False

    def __post_init__(self) -> None:
        if self.patch_mean and self.blocks != 1:
            raise UserError(
                f"--avgpool_patchtokens true goes with --n_last_blocks 1, as for DINO's ViT-B; got {self.blocks}"
            )

    def __call__(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, H, W)."""
        if not reads_blocks(backbone):
            return tokens(backbone, images)[0].float()
        blocks = last_blocks(backbone, images, self.blocks)
        class_tokens = torch.cat([class_BC for class_BC, _ in blocks], dim=1)
        if not self.patch_mean:
            return class_tokens.float()
        mean_BC = blocks[-1][1].mean(dim=1)
        # Channel by channel, class token and mean in turn: the order of the published classifiers' weights.
        return torch.stack([class_tokens, mean_BC], dim=-1).flatten(1).float()

    def describe(self, backbone: nn.Module) -> str:
        """In words, for a table."""
        if not reads_blocks(backbone) or self.blocks == 1:
            return "CLS + patch mean" if self.patch_mean and reads_blocks(backbone) else "CLS"
        return f"CLS of {self.blocks} blocks"

    def width(self, extractor: Extractor) -> int:
        """D."""
        side = extractor.preparation.size
        with torch.no_grad():
            return extractor.run(torch.zeros(1, 3, side, side), self).shape[1]


class LinearClassifier(nn.Module):
    """(B, width) -> (B, num_classes), from N(0, 0.01^2) and no bias.

    Attributes:
        classes: names of the first outputs, as far as they are known.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, width: int, num_classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_classes)
        with torch.no_grad():
            self.linear.weight.normal_(std=_INITIAL_DEVIATION, generator=generator)
            self.linear.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


def classifier_state(classifier: LinearClassifier) -> dict[str, Tensor]:
    """Its tensors under the names of DINO's files."""
    return {_WRAPPED + name: value for name, value in classifier.state_dict().items()}


def load_classifier(source: str, width: int) -> LinearClassifier:
    """A trained classifier from a file or URL of DINO's layout, ours included.

    Raises:
        UserError: it cannot be had or read, or is for features of another width.
    """
    try:
        content = read_checkpoint(resolve(source))
    except WeightsError as error:
        raise UserError(str(error)) from error
    return classifier_from(content, width, source)


def classifier_from(content: Mapping[str, Any], width: int, source: str) -> LinearClassifier:
    """The same from what the file holds."""
    stored = content.get("state_dict", content)
    state = {str(name).removeprefix(_WRAPPED): value for name, value in stored.items()}
    weight, bias = state.get("linear.weight"), state.get("linear.bias")
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 2:
        raise UserError(f"{source} holds no linear classifier: linear.weight and linear.bias are expected")
    num_classes, stored_width = weight.shape
    if stored_width != width:
        raise UserError(
            f"the classifier in {source} is for features {stored_width} wide, this backbone gives {width}: it belongs "
            "to another backbone, or to another --n_last_blocks or --avgpool_patchtokens"
        )
    classifier = LinearClassifier(width, num_classes)
    classifier.load_state_dict({"linear.weight": weight, "linear.bias": bias})
    classifier.classes = tuple(map(str, content.get("classes", ())))  # DINO's files do not say
    return classifier


@dataclass(frozen=True, eq=False)
class Scores:
    """In percent, and what they are made of.

    Attributes:
        top5: None where there are fewer than 5 classes.
        loss: mean cross-entropy.
        labels, predictions: (n,) int64, of the readable pictures in their order.
        broken: "name: reason" of the others.
    """

    top1: float
    top5: float | None
    balanced: float
    loss: float
    labels: np.ndarray
    predictions: np.ndarray
    broken: list[str]


def score(
    extractor: Extractor,
    tokens_of: Callable[[nn.Module, Tensor], Tensor],
    classifier: nn.Module,
    pictures: Pictures,
    numbers: np.ndarray,
    *,
    progress: str | None,
) -> Scores:
    """Classify every picture once, over all processes together, each of which gets the scores.

    Args:
        tokens_of: backbone and images (B, 3, H, W) to features (B, D).
        classifier: features to logits (B, classes).
        numbers: (classes of the pictures,) int64: which output each class is.
        progress: title of the main process's bar, for its part; None = no bar.

    Raises:
        UserError: no picture can be read.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    part = range(len(pictures) * rank // processes, len(pictures) * (rank + 1) // processes)
    assert pictures.labels is not None
    labels = numbers[np.asarray(pictures.labels)]
    found: list[tuple[int, int, int, float]] = []
    broken: dict[int, str] = {}
    classes = 0
    with evaluating(classifier), torch.no_grad():
        title = progress if distributed.is_main() else None
        for places, images, messages in extractor.batches(pictures, part, progress=title):
            broken.update(messages)
            if images is None:
                continue
            logits = classifier(extractor.run(images, tokens_of)).float().cpu()
            classes = logits.shape[1]
            target = torch.from_numpy(labels[places])
            losses = F.cross_entropy(logits, target, reduction="none").tolist()
            own = logits.gather(1, target[:, None])
            ranks = (logits > own).sum(dim=1).tolist()
            found += zip(places, logits.argmax(dim=1).tolist(), ranks, losses, strict=True)
    classes = max(distributed.gather([classes]))  # a process without pictures has seen none
    found = distributed.gather(found)
    messages = dict(distributed.gather(list(broken.items())))
    if not found:
        raise UserError(f"none of the {len(pictures)} pictures can be read; {next(iter(messages.values()))}")
    places_n, predictions, ranks_n, losses_n = (np.array(column) for column in zip(*found, strict=True))
    correct = predictions == labels[places_n]
    return Scores(
        top1=100 * float(correct.mean()),
        top5=100 * float((ranks_n < 5).mean()) if classes >= 5 else None,
        balanced=balanced_accuracy(correct, labels[places_n]),
        loss=float(losses_n.mean()),
        labels=labels[places_n],
        predictions=predictions,
        broken=list(messages.values()),
    )


def outputs_of(
    outputs: int, known: Sequence[str], names: Sequence[str], classes: Sequence[str], *, num_labels: int = 0
) -> np.ndarray:
    """Which output of a trained classifier each of the classes `names` is, int64.

    Args:
        outputs: how many the classifier has.
        known: names of its first outputs; empty where it does not say.
        classes: what it was trained on, as far as the data shows it, for one that does not say; `names` are among them.
        num_labels: how many it was given where they were meant to be more than the classes.

    Raises:
        UserError: they cannot be told.
    """
    if known:
        unknown = [name for name in names if name not in set(known)]
        if unknown:
            raise UserError(
                f"the classifier was not trained on {len(unknown)} of the {len(names)} classes of val, such as "
                f"{unknown[0]}; it knows {', '.join(known[:5])}"
            )
        return class_numbers(names, known)
    if outputs == NUM_CLASSES:
        numbers = imagenet_numbers(names)
        if numbers is not None:
            return numbers
    if outputs in (len(classes), num_labels):
        return class_numbers(names, classes)
    raise UserError(
        f"the classifier has {outputs} classes and the data {len(classes)}: it was trained on other classes"
        + (f", or with --num_labels {outputs}" if outputs > len(classes) else "")
        + ("; folders named as ImageNet's (n01440764, ...) are recognised" if outputs == NUM_CLASSES else "")
    )
