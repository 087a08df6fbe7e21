"""A segmentation network from what a user names: architecture, head and weights, each of which may tell the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import xcit
from dino.downstream.segmentation.classes import Classes
from dino.downstream.segmentation.options import DEFAULT_ARCH, published_drop_path
from dino.runtime.options import AUTO, UserError
from xcit.openmmlab import is_segmenter, load_segmenter, read_network, segmenter_kind, segmenter_names
from xcit.segmenter import HEADS, Segmenter
from xcit.weights import LoadReport, WeightsError, architecture_of, read_checkpoint, read_state_dict, resolve

FACTS_KEY = "segmentation"  # of our checkpoints
_DEFAULT_HEAD = "fpn"
_OF_ADE20K = 150  # classes, which begin with number 1 there


@dataclass(frozen=True)
class SegmenterWeights:
    """What a file of weights is for.

    Attributes:
        source: published name, file or URL; "" = random weights.
        arch: XCiT name; None where it does not tell.
        head: of a whole segmentation network; None for a backbone.
        classes: of a whole network.
        certain: whether the classes' ids are in the file, and not guessed.
        scale: what pictures were fitted into, as `--scale` takes it; None where it does not tell.
    """

    source: str = ""
    arch: str | None = None
    head: str | None = None
    classes: Classes | None = None
    certain: bool = False
    scale: tuple[int, ...] | None = None


def open_weights(source: str, *, key: str = "teacher") -> SegmenterWeights:
    """Find out what weights are for; they are loaded by `create_segmenter`.

    Args:
        source: published name, file or URL, of a backbone or a whole network; "" = random weights.
        key: network of a DINO checkpoint.

    Raises:
        UserError: they cannot be had or read.
    """
    if not source:
        return SegmenterWeights()
    try:
        file = resolve(source)
        content = read_checkpoint(file)
        network = _whole_network(content)
        if network is None:
            return SegmenterWeights(source, architecture_of(read_state_dict(file, key=key)))
    except WeightsError as error:
        raise UserError(f"--weights: {error}") from error
    head, count, arch = segmenter_kind(network)
    facts = content.get(FACTS_KEY)
    if isinstance(facts, Mapping):
        classes = Classes.from_plain(facts["classes"])
        return SegmenterWeights(source, arch, head, classes, True, tuple(facts["scale"]))
    return SegmenterWeights(source, arch, head, _guessed_classes(count, content.get("meta")))


def _whole_network(content: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """A segmenter's tensors by our names; None for a backbone's."""
    try:
        state = segmenter_names(read_network(content)[0])
    except WeightsError:  # no tensors where whole networks keep them, as in DINO's checkpoints
        return None
    return state if is_segmenter(state) else None


def _guessed_classes(count: int, meta: Any) -> Classes:
    """mmsegmentation's files have names at most; of ids they say nothing."""
    names: Any = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if not isinstance(names, Sequence) or len(names) != count:
        names = [""] * count
    first = 1 if count == _OF_ADE20K else 0
    return Classes.named({first + place: str(name) for place, name in enumerate(names)})


@dataclass(frozen=True, eq=False)
class NamedSegmenter:
    """A network and what it turned out to be.

    Attributes:
        report: what was loaded; None for random weights.
        fresh_classifier: whether the last layer is random, since the weights are for other classes.
    """

    network: Segmenter
    arch: str
    head: str
    report: LoadReport | None
    fresh_classifier: bool = False

    def __str__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        what = f"{self.arch} with {self.head}, {parameters / 1e6:.1f} M parameters"
        fresh = "; the last layer is new, for other classes" if self.fresh_classifier else ""
        return f"{what}: {self.report or 'random weights'}{fresh}"


def create_segmenter(
    weights: SegmenterWeights,
    num_classes: int,
    *,
    arch: str = AUTO,
    head: str = AUTO,
    drop_path: float = -1.0,
    key: str = "teacher",
    seed: int = 0,
) -> NamedSegmenter:
    """A network with the weights; what they do not hold is random, and so is the last layer where classes are others.

    Args:
        arch: `auto` = what the weights are for, else the default one.
        head: the same.
        drop_path: stochastic depth; -1 = as published.
        key: network of a DINO checkpoint.
        seed: of the random weights.

    Raises:
        UserError: an unknown name, or weights that do not fit.
    """
    arch = (weights.arch or DEFAULT_ARCH) if arch == AUTO else arch
    head = (weights.head or _DEFAULT_HEAD) if head == AUTO else head
    if arch not in xcit.list_models(all=True):
        raise UserError(
            f"--arch {arch}: segmentation takes XCiTs; {xcit.zoo.nearest(arch, xcit.list_models())}"
        )
    torch.manual_seed(seed)
    pyramid = xcit.create_pyramid(
        arch, drop_path_rate=published_drop_path(arch, head) if drop_path < 0 else drop_path
    )
    network = HEADS[head](pyramid, len(weights.classes) if weights.classes else num_classes)
    report = None
    try:
        if weights.head is not None:
            report = load_segmenter(network, weights.source)
        elif weights.source:
            report = xcit.load_weights(pyramid.trunk, weights.source, key=key)
    except WeightsError as error:
        raise UserError(f"--weights: {error}") from error
    others = weights.classes is not None and len(weights.classes) != num_classes
    if others:
        network.reset_classifier(num_classes)
    return NamedSegmenter(network, arch, head, report, others)
