"""A detector from what a user names: architecture, classes and weights, of which the last may tell the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import xcit
from dino.downstream.detection.options import DEFAULT_ARCH, published_drop_path
from dino.runtime.options import AUTO, UserError
from xcit.detector import MaskRCNN
from xcit.openmmlab import detector_names, is_detector, load_detector, read_network, trunk_of
from xcit.weights import LoadReport, WeightsError, architecture_of, read_checkpoint, read_state_dict, resolve

FACTS_KEY = "detection"  # of our checkpoints
_CLASS_WEIGHT = "roi_heads.box_predictor.cls_score.weight"
_OF_COCO = 80  # classes
_COCO_HOLES = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO's categories leave out


@dataclass(frozen=True)
class Classes:
    """What a detector's labels stand for.

    Attributes:
        names: by label.
        ids: of their categories in COCO files, by label.
        certain: whether the names are known, and not made up.
    """

    names: list[str]
    ids: list[int]
    certain: bool = True


@dataclass(frozen=True)
class DetectorWeights:
    """What a file of weights is for.

    Attributes:
        source: published name, file or URL; "" = random weights.
        arch: XCiT name; None where it does not tell.
        classes: of a whole detector; None for a backbone.
        sides: short and long side of the pictures that it is scored with; None where it does not tell.
    """

    source: str = ""
    arch: str | None = None
    classes: Classes | None = None
    sides: tuple[int, int] | None = None


def open_weights(source: str, *, key: str = "teacher") -> DetectorWeights:
    """Find out what weights are for; they are loaded by `create_detector`.

    Args:
        source: published name, file or URL, of a backbone or a whole detector; "" = random weights.
        key: network of a DINO checkpoint.

    Raises:
        UserError: they cannot be had or read.
    """
    if not source:
        return DetectorWeights()
    try:
        file = resolve(source)
        content = read_checkpoint(file)
        state = _whole_detector(content)
        if state is None:
            return DetectorWeights(source, architecture_of(read_state_dict(file, key=key)))
    except WeightsError as error:
        raise UserError(f"--weights: {error}") from error
    arch = architecture_of(trunk_of(state))
    facts = content.get(FACTS_KEY)
    if isinstance(facts, Mapping):
        short, long = facts["sides"]
        return DetectorWeights(source, arch, Classes(facts["classes"], facts["ids"]), (short, long))
    return DetectorWeights(source, arch, _guessed_classes(len(state[_CLASS_WEIGHT]) - 1, content.get("meta")))


def _whole_detector(content: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """A detector's tensors by our names; None for a backbone's."""
    try:
        state = detector_names(read_network(content)[0])
    except WeightsError:  # no tensors where whole networks keep them, as in DINO's checkpoints
        return None
    if is_detector(state) and _CLASS_WEIGHT not in state:
        raise WeightsError(
            "it is a part of a detector, or of another kind than Mask R-CNN: it has no classes"
        )
    return state if is_detector(state) else None


def _guessed_classes(count: int, meta: Any) -> Classes:
    """mmdetection's files have names at most, and number labels by ascending ids of COCO's."""
    names: Any = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    certain = isinstance(names, Sequence) and not isinstance(names, str) and len(names) == count
    holes = _COCO_HOLES if count == _OF_COCO else set()
    ids = [number for number in range(1, count + len(holes) + 1) if number not in holes]
    return Classes([str(each) for each in (names if certain else map("class {}".format, ids))], ids, certain)


@dataclass(frozen=True, eq=False)
class NamedDetector:
    """A network and what it turned out to be.

    Attributes:
        report: None for random weights.
        fresh: whether its last layers are, since the weights' own are for other classes.
    """

    network: MaskRCNN
    arch: str
    report: LoadReport | None
    fresh: bool = False

    def __str__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        what = f"Mask R-CNN on {self.arch}, {parameters / 1e6:.1f} M parameters"
        fresh = ", with fresh last layers for other classes" if self.fresh else ""
        return f"{what}: {self.report or 'random weights'}{fresh}"


def create_detector(
    weights: DetectorWeights,
    num_classes: int,
    *,
    sides: tuple[int, int],
    fresh: bool = False,
    arch: str = AUTO,
    drop_path: float = -1.0,
    regions: int = 512,
    score_threshold: float = 0.05,
    key: str = "teacher",
    seed: int = 0,
) -> NamedDetector:
    """A network with the weights; what they do not hold is random.

    Args:
        sides: short and long side in pixels of pictures that are scored.
        fresh: give a whole detector's weights other last layers, for other classes.
        arch: `auto` = what the weights are for, else the default one.
        drop_path: stochastic depth; -1 = as published.
        regions, score_threshold: see `MaskRCNN`.
        key: network of a DINO checkpoint.
        seed: of the random weights.

    Raises:
        UserError: an unknown name, or weights that do not fit.
    """
    arch = (weights.arch or DEFAULT_ARCH) if arch == AUTO else arch
    if arch not in xcit.list_models(all=True):
        raise UserError(f"--arch {arch}: detection takes XCiTs; {xcit.zoo.nearest(arch, xcit.list_models())}")
    torch.manual_seed(seed)
    rate = published_drop_path(arch) if drop_path < 0 else drop_path
    pyramid = xcit.create_pyramid(arch, drop_path_rate=rate)
    fresh = fresh and weights.classes is not None
    network = MaskRCNN(
        pyramid,
        len(weights.classes.names) if fresh and weights.classes else num_classes,
        short_side=sides[0],
        long_side=sides[1],
        regions=regions,
        score_threshold=score_threshold,
    )
    report = None
    try:
        if weights.classes is not None:
            report = load_detector(network, weights.source)
        elif weights.source:
            report = xcit.load_weights(pyramid.trunk, weights.source, key=key)
    except WeightsError as error:
        raise UserError(f"--weights: {error}") from error
    if fresh:
        network.reset_classifier(num_classes)
    return NamedDetector(network, arch, report, fresh)
