"""A classifier from what a user names: a backbone with weights of any origin, and a head for the classes at hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from dino.runtime.backbones import (
    check_side,
    create_backbone,
    create_timm_classifier,
    load_backbone_weights,
)
from dino.runtime.changed_options import stored_options
from dino.runtime.named_backbone import architecture_of
from dino.runtime.options import AUTO, UserError
from xcit.weights import WeightsError, read_checkpoint, read_state_dict, resolve
from xcit.weights import architecture_of as architecture_in

_DEFAULT = "xcit_small_12_p16"


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network (B, 3, H, W) -> (B, classes), and where it is from.

    Attributes:
        note: what was loaded, in a line.
        classes: of the outputs in the weights file; empty where it does not say.
        has_head: whether the head is the weights' own.
    """

    network: nn.Module
    arch: str
    note: str
    classes: tuple[str, ...] = ()
    has_head: bool = False


def pick_architecture(arch: str, patch_size: int, weights: str) -> tuple[str, int]:
    """The architecture and patch size that `auto` stands for: what the weights are, else the default.

    Raises:
        UserError: the weights cannot be had or read.
    """
    if arch != AUTO:
        return arch, patch_size
    if not weights:
        return _DEFAULT, patch_size
    known = _said_by(weights)
    if known is None:
        try:
            found = architecture_in(read_state_dict(weights))
        except WeightsError as error:
            raise UserError(str(error)) from error
        known = (found, None) if found else None
    if known is None:
        raise UserError(f"{weights} does not say what it is for: name its architecture with --model")
    return known[0], known[1] or patch_size


def _said_by(weights: str) -> tuple[str, int | None] | None:
    """What a published name or a checkpoint's options say; classification's call the architecture `model`."""
    known = architecture_of(weights)
    if known is not None:
        return known
    named = stored_options(_content(weights).get("args"))
    model = named.get("model")
    return (model, named.get("patch_size")) if isinstance(model, str) and model != AUTO else None


def create_classifier(
    arch: str,
    num_classes: int | None,
    *,
    patch_size: int = 16,
    input_size: int = 224,
    drop_path_rate: float = 0.0,
    weights: str = "",
    key: str = "teacher",
) -> Classifier:
    """Build the network and fill it; where the weights' head does not fit, it gets a fresh one.

    Args:
        num_classes: outputs; None = as many as the weights have.
        weights: published name, file or URL; empty = random.
        key: network of a full DINO checkpoint.

    Raises:
        UserError: anything wrong with names, weights or sizes.
    """
    network = create_backbone(arch, patch_size, drop_path_rate)
    check_side(network, input_size, "--input_size")
    if not weights:
        if num_classes is None:
            raise UserError("there are no weights to take the number of classes from")
        _give_head(network, num_classes)
        return Classifier(network, arch, "random weights")
    report = load_backbone_weights(network, weights, key=key)
    state = _state_of(weights, key)
    _give_head(network, num_classes or 1)  # for its name
    head = state.get(f"{_head_name(network)}.weight")
    if num_classes is None and head is None:
        raise UserError(f"{weights} has no classification head to evaluate: train one first")
    outputs = num_classes or len(cast(Tensor, head))
    _give_head(network, outputs)
    fits = head is not None and len(head) == outputs
    if fits:
        load_backbone_weights(network, cast(Any, state))
    heads = f"with its head of {outputs} classes" if fits else "with a fresh head"
    classes = tuple(map(str, _content(weights).get("classes", ()))) if fits else ()
    return Classifier(network, arch, f"{report}, {heads}", classes, fits)


def _give_head(network: nn.Module, num_classes: int) -> None:
    cast(Any, network).reset_classifier(num_classes)


def _head_name(network: nn.Module) -> str:
    """What the last layer is called: `head`, `fc`, `head.fc`, ..."""
    last = cast(Any, network).get_classifier()
    return next(name for name, module in network.named_modules() if module is last)


def _state_of(weights: str, key: str) -> dict[str, Tensor]:
    try:
        return read_state_dict(weights, key=key)
    except WeightsError as error:
        raise UserError(str(error)) from error


def _content(weights: str) -> dict[str, Any]:
    try:
        return read_checkpoint(resolve(weights))
    except WeightsError as error:
        raise UserError(str(error)) from error


def hold_patch_embedding(network: nn.Module, weights: str) -> str:
    """Fill the patch embedding from weights, and keep it as it is; returns a line.

    Raises:
        UserError: the weights have no patch embedding of this kind.
    """
    embedding = getattr(network, "patch_embed", None)
    if embedding is None:
        raise UserError(f"--surgery: {type(network).__name__} has no patch embedding")
    prefix = "patch_embed."
    state = {
        name.removeprefix(prefix): value
        for name, value in _state_of(weights, "teacher").items()
        if name.startswith(prefix)
    }
    report = load_backbone_weights(embedding, cast(Any, state)) if state else None
    if report is None:
        raise UserError(f"--surgery {weights}: there is no patch embedding in it")
    embedding.requires_grad_(False)
    return f"patch embedding: {report.matched} tensors of {weights}, held still"


def create_teacher(name: str, weights: str, num_classes: int) -> nn.Module:
    """A teacher for distillation, in evaluation mode.

    Args:
        name: of timm, or of a backbone here.
        weights: file or URL; empty = those that timm offers.

    Raises:
        UserError: it is not known, or its weights cannot be had or are for other classes.
    """
    if weights:
        teacher = create_classifier(name, num_classes, weights=weights)
        if not teacher.has_head:
            raise UserError(f"--teacher_path {weights} has no head for {num_classes} classes to teach with")
        return teacher.network.eval().requires_grad_(False)
    network = create_timm_classifier(name)
    if network.num_classes != num_classes:
        raise UserError(
            f"--teacher_model {name} knows {network.num_classes} classes, the data has {num_classes}: name weights for "
            "them with --teacher_path"
        )
    return network.eval().requires_grad_(False)


def names_of_outputs(classes: Sequence[str], outputs: int) -> list[str]:
    """A name for each output; numbers where there are more than names."""
    return [*classes[:outputs], *(str(number) for number in range(len(classes), outputs))]


def outputs_in(network: nn.Module) -> int:
    """Of a classifier's last layer."""
    classifier = cast(Any, network).get_classifier()
    return int(classifier.out_features)
