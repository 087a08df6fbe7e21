"""Weights of whole networks for detection or segmentation, in OpenMMLab's layout, that they are published in, or ours.

    report = load_detector(model, "maskrcnn_xcit_small_12_p16.pth")
    print(report)    # how many tensors were loaded, and from where

A network is changed only if every tensor of it is in the file, and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from xcit.download import sha256
from xcit.weights import LoadReport, WeightsError, architecture_of, read_checkpoint, resolve, troubles

# Patterns of names, of which the first that fits a name says how it is called here.
Names = Sequence[tuple[str, str]]

_COUNTER = ".num_batches_tracked"  # absent from old files, and of no use
_WRAPPER = "module."  # DistributedDataParallel's

_OF_A_PYRAMID: Names = (
    (r"backbone\.(fpn\d\..+)", r"backbone.pyramid.\1"),
    (r"backbone\.((?:patch_embed|pos_embeder|blocks)\..+)", r"backbone.pyramid.trunk.\1"),
)

_OF_A_DETECTOR: Names = (
    *_OF_A_PYRAMID,
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(\w+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.head.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(\w+)", r"roi_heads.box_head.fc6.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(\w+)", r"roi_heads.box_head.fc7.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(\w+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(\w+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.(\w+)", r"roi_heads.mask_head.convolutions.\1.\2"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", r"roi_heads.mask_head.upsampling.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
)

_OF_A_SEGMENTER: Names = (
    *((ours, theirs.replace("backbone.pyramid", "pyramid")) for ours, theirs in _OF_A_PYRAMID),
    (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"neck.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", r"neck.layer_blocks.\1.0.\2"),
)

_TRUNK = "backbone.pyramid.trunk."
_TRUNK_OF_A_SEGMENTER = "pyramid.trunk."


def load_detector(model: nn.Module, source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Fill a `MaskRCNN` from a file, a URL or a checkpoint's content, of mmdetection or our own.

    Raises:
        WeightsError: the file cannot be had or read, or is not just this network's; it is then unchanged.
    """
    state, origin = read_network(source)
    return fill(model, detector_names(state), origin)


def read_network(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], str | Path]:
    """A whole network's tensors under the file's names, and where they came from.

    Raises:
        WeightsError: the file cannot be had or read, or holds no tensors.
    """
    origin: str | Path = "a checkpoint" if isinstance(source, Mapping) else resolve(source)
    checkpoint = read_checkpoint(origin) if isinstance(origin, Path) else source
    assert isinstance(checkpoint, Mapping)
    for name in ("state_dict", "model"):
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
    state = {
        str(name).removeprefix(_WRAPPER): value
        for name, value in checkpoint.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise WeightsError(f"{origin} holds no tensors where weights are kept")
    return state, origin


def detector_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names that `MaskRCNN` gives them."""
    return renamed(state, _OF_A_DETECTOR)


def is_detector(state: Mapping[str, Tensor]) -> bool:
    """Whether these are a detector's tensors, in either layout, and not a backbone's alone."""
    return any(name.startswith(("roi_head.", "roi_heads.")) for name in state)


def trunk_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a network's tensors those of its trunk, by the trunk's own names: see `weights.architecture_of`."""
    ours = renamed(state, _OF_A_PYRAMID)
    return {name.removeprefix(_TRUNK): value for name, value in ours.items() if name.startswith(_TRUNK)}


def load_segmenter(model: nn.Module, source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Fill a `SemanticFPN` or a `UPerNet` from a file, a URL or a checkpoint's content, of mmsegmentation or our own.

    Raises:
        WeightsError: the file cannot be had or read, or is not just this network's; it is then unchanged.
    """
    state, origin = read_network(source)
    state = segmenter_names(state)
    found, wanted = segmenter_in_words(state), segmenter_in_words(model.state_dict())
    if found != wanted:
        raise WeightsError(f"{origin} holds {found}, and the network is {wanted}")
    return fill(model, state, origin)


def segmenter_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names that a `Segmenter` gives them."""
    return renamed(state, _OF_A_SEGMENTER)


def is_segmenter(state: Mapping[str, Tensor]) -> bool:
    """Whether these are a segmenter's tensors, in either layout, and not a backbone's alone."""
    return "decode_head.conv_seg.weight" in state


def segmenter_kind(state: Mapping[str, Tensor]) -> tuple[str, int, str | None]:
    """Head, as in `segmenter.HEADS`, number of classes and architecture, of tensors by a `Segmenter`'s names."""
    trunk = {
        name.removeprefix(_TRUNK_OF_A_SEGMENTER): value
        for name, value in state.items()
        if name.startswith(_TRUNK_OF_A_SEGMENTER)
    }
    head = "upernet" if any(name.startswith("decode_head.psp_modules.") for name in state) else "fpn"
    return head, len(state["decode_head.conv_seg.weight"]), architecture_of(trunk)


def segmenter_in_words(state: Mapping[str, Tensor]) -> str:
    """What these tensors are, by a `Segmenter`'s names."""
    if not is_segmenter(state):
        return "no segmentation network"
    head, classes, arch = segmenter_kind(state)
    kind = {"fpn": "a Semantic FPN", "upernet": "a UPerNet"}[head]
    return f"{kind} for {classes} classes on {arch or 'a backbone that is no XCiT'}"


def renamed(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The same tensors; those that no pattern fits keep their names."""
    return {_renamed(name, names): value for name, value in state.items()}


def _renamed(name: str, names: Names) -> str:
    for pattern, ours in names:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(ours)
    return name


def fill(model: nn.Module, state: Mapping[str, Tensor], origin: str | Path) -> LoadReport:
    """Fill a network from tensors by its own names: all of it, and with all of them.

    Args:
        origin: file, or what else the tensors came from.

    Raises:
        WeightsError: they are not just this network's; it is then unchanged.
    """
    target = model.state_dict()
    fitting = {
        name: state[name] for name in target if name in state and state[name].shape == target[name].shape
    }
    missing = [name for name in target if name not in fitting and not name.endswith(_COUNTER)]
    left_over = [name for name in state if name not in target]
    if missing or left_over:
        raise WeightsError(
            f"{origin} does not fit the network's {len(target)} tensors: "
            f"{troubles(state, target, missing, left_over)}; "
            "its architecture, task and number of classes must be those of the file"
        )
    model.load_state_dict(fitting, strict=False)
    digest = sha256(origin) if isinstance(origin, Path) else None
    return LoadReport(len(fitting), len(fitting), [], [], str(origin), digest)
