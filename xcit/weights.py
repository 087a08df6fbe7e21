"""One loader for every layout in which XCiT, DINO and timm backbones are found.

    report = load_weights(model, "dino_xcit_small_12_p16")
    print(report)    # how many tensors were loaded, from where, and what was left over

Files are read without unpickling code. A model is changed only if the whole backbone fits.
"""

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from xcit.download import WeightsError, fetch, is_url, sha256
from xcit.zoo import PUBLISHED, architecture_like, nearest

__all__ = [
    "LoadReport",
    "WeightsError",
    "architecture_of",
    "load_weights",
    "read_checkpoint",
    "read_state_dict",
    "resolve",
]

# DINO's checkpoints hold their options as a Namespace (with a path in it, after its script for clusters), and
# rates and decays as numpy's numbers. Some of these have had two names; none can run anything.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(number)) for number in "?bhilqBHILQefdU"),
    (PurePosixPath, "pathlib.PosixPath"),
    (PurePosixPath, "pathlib._local.PosixPath"),
]

_WRAPPERS = ("module", "backbone")  # DistributedDataParallel; DINO's and detectors' networks
_TIMM_CLASS_ATTENTION = re.compile(r"(cls_attn_blocks\.\d+\.attn)\.([qkv])\.(weight|bias)")
_HEADS = ("head", "fc", "classifier")  # where models keep their classifier
_AFTER_THE_TRUNK = ("cls_token", "cls_attn_blocks", "norm")
_OF_A_VIT = ("cls_token", "patch_embed.proj.weight")
_COUNTER = ".num_batches_tracked"  # of use only to batch norms without momentum, and absent from old files


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors and of a model's.

    Attributes:
        matched: tensors of the model that were filled.
        total: tensors of the model; batch norm's counters count only if the file has them.
        missing: those that the file does not hold, or holds in another shape.
        unexpected: tensors of the file whose names the model does not have.
        source: file, or what else the tensors came from.
        sha256: of the file.
    """

    matched: int
    total: int
    missing: list[str]
    unexpected: list[str]
    source: str
    sha256: str | None

    def __str__(self) -> str:
        checksum = f" (sha256 {self.sha256[:8]}...)" if self.sha256 else ""
        missing = f", missing: {some(self.missing)}" if self.missing else ""
        unused = f", left over: {some(self.unexpected)}" if self.unexpected else ""
        return f"{self.matched} of {self.total} tensors loaded from {self.source}{checksum}{missing}{unused}"


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    key: str = "teacher",
    allow_partial: bool = False,
) -> LoadReport:
    """Fill a model from a published name, a file, a URL or a state dict, in any known layout.

    A classification head in the file is left over when the model has none.

    Args:
        model: an XCiT, or any model whose state dict has the file's names, such as timm's.
        key: network to take from a DINO checkpoint, `teacher` or `student`.
        allow_partial: load what fits, instead of refusing less than the whole model.

    Raises:
        WeightsError: the weights cannot be had or read, or are not the whole model's; the model is
            then unchanged.
    """
    if not isinstance(source, Mapping):
        source = resolve(source)
    state = read_state_dict(source, key=key)
    origin, digest = (str(source), sha256(source)) if isinstance(source, Path) else ("a state dict", None)
    target = model.state_dict()
    if "pos_embeder.token_projection.weight" in target:
        state = _official_names(state)

    same_name = {name: state[name] for name in target if name in state}
    fitting = {name: value for name, value in same_name.items() if value.shape == target[name].shape}
    missing = [name for name in target if name not in fitting and not name.endswith(_COUNTER)]
    unexpected = [name for name in state if name not in target]
    refused = [name for name in unexpected if not _belongs_to_more(name, target)]
    if not fitting or ((missing or refused) and not allow_partial):
        raise WeightsError(_misfit(origin, state, target, missing, refused))
    model.load_state_dict(fitting, strict=False)
    return LoadReport(len(fitting), len(fitting) + len(missing), missing, unexpected, origin, digest)


def read_state_dict(source: str | Path | Mapping[str, Any], *, key: str = "teacher") -> dict[str, Tensor]:
    """A backbone's tensors under the names that the backbone itself gives them; a file's are on the CPU.

    Wrappers' prefixes (`module.`, `backbone.`, `_orig_mod.`) are taken off. If some names have
    `backbone.`, the others belong to DINO's head or to a detector, and are dropped.

    Raises:
        WeightsError: the source cannot be had or read, or holds no tensors.
    """
    if isinstance(source, Mapping):
        origin, checkpoint = "the state dict", source
    else:
        file = resolve(source)
        origin, checkpoint = str(file), read_checkpoint(file)
    found = _select(checkpoint, key, origin)
    named = [
        (*_split_wrappers(name), value)
        for name, value in found.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    ]
    if not named:
        raise WeightsError(f"{origin} holds no tensors where weights are kept; its keys: {some(checkpoint)}")
    only_backbone = any("backbone" in wrappers for wrappers, _, _ in named)
    return {name: value for wrappers, name, value in named if not only_backbone or "backbone" in wrappers}


def resolve(source: str | Path) -> Path:
    """The local file of a published name, URL or path, downloaded if need be.

    Raises:
        WeightsError: there is no such file, or it cannot be downloaded.
    """
    if isinstance(source, str) and source in PUBLISHED:
        return fetch(PUBLISHED[source].url)
    if isinstance(source, str) and is_url(source):
        return fetch(source)
    try:
        file = Path(source).expanduser()
        is_folder, is_file = file.is_dir(), file.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us, an unknown home
        reason = error.strerror if isinstance(error, OSError) else error
        raise WeightsError(f"cannot look for {source}: {reason}") from error
    if is_folder:
        raise WeightsError(f"{file} is a folder; name the weights file in it")
    if not is_file:
        is_name = len(file.parts) == 1 and not file.suffix
        hint = nearest(str(source), list(PUBLISHED)) if is_name else "check the path"
        raise WeightsError(f"there is no file {file}, and no published weights of that name; {hint}")
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Everything in a safetensors or PyTorch file, on the CPU. Nothing in it is executed.

    Raises:
        WeightsError: the file is damaged, is of another kind, or holds more than data.
    """
    try:
        if _is_safetensors(file):
            return safetensors.torch.load_file(file)
        # Opened here, since torch too goes by a file's name.
        with torch.serialization.safe_globals(_SAFE_TYPES), file.open("rb") as stream:
            checkpoint = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in every way there is
        raise WeightsError(_unreadable(file, error)) from error
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{file} holds a {type(checkpoint).__name__}, not a state dict or checkpoint")
    return dict(checkpoint)


def _is_safetensors(file: Path) -> bool:
    """By its first bytes, a length and the JSON that is so long: names are not always right."""
    with file.open("rb") as stream:
        return stream.read(9)[8:] == b"{"


def _unreadable(file: Path, error: Exception) -> str:
    refused = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        return (
            f"{file} refers to {refused[1]}, which could run code when read; only tensors and plain values "
            "are accepted: save the state dict alone"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{file} cannot be read: {error.strerror}"
    return f"{file} ({file.stat().st_size:,} bytes) is not a weights file, or it is damaged or cut short"


def _select(checkpoint: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    """The state dict within a checkpoint, however it is nested."""
    for name in (key, "model", "state_dict"):
        if isinstance(checkpoint.get(name), Mapping):
            return _select(checkpoint[name], key, origin)
    networks = [name for name in ("teacher", "student") if name in checkpoint]
    if networks:
        raise WeightsError(f"{origin} has no network '{key}'; it has {' and '.join(networks)}")
    return checkpoint


def _split_wrappers(name: str) -> tuple[set[str], str]:
    """`module.backbone.norm.weight` -> ({module, backbone}, `norm.weight`)."""
    parts = name.replace("_orig_mod.", "").split(".")  # a model compiled in parts has it in the middle
    bare = list(dropwhile(_WRAPPERS.__contains__, parts))
    return set(parts[: len(parts) - len(bare)]), ".".join(bare)


def _official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of an XCiT's tensors to the published ones; those that are so already stay."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        part = _TIMM_CLASS_ATTENTION.fullmatch(name)
        if part is None:
            renamed[re.sub(r"^pos_embed\.", "pos_embeder.", name)] = value
        elif part[2] == "q":
            parts = [state.get(f"{part[1]}.{letter}.{part[3]}") for letter in "qkv"]
            fitting = [each for each in parts if each is not None and each.shape[1:] == value.shape[1:]]
            renamed[f"{part[1]}.qkv.{part[3]}"] = torch.cat(fitting) if value.ndim else value
    return renamed


def troubles(
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    missing: Sequence[str],
    left_over: Sequence[str],
) -> str:
    """In words, how many tensors of a model a file lacks or has in another shape, and which it has beyond them."""
    named = {
        "missing": [name for name in missing if name not in state],
        "of another shape": [
            f"{name} {shape_in_words(state[name])}, not {shape_in_words(target[name])}"
            for name in missing
            if name in state
        ],
        "left over": left_over,
    }
    return ", ".join(f"{len(names)} {trouble} ({some(names)})" for trouble, names in named.items() if names)


def _belongs_to_more(name: str, target: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is of a part that follows on all that a model has: its head, and what makes a trunk an XCiT."""
    part = name.split(".", 1)[0]
    if part in _AFTER_THE_TRUNK:
        return "cls_token" not in target and "pos_embeder.token_projection.weight" in target
    return _is_head(name) and not any(map(_is_head, target))


def _is_head(name: str) -> bool:
    return name.split(".", 1)[0] in _HEADS


def _misfit(
    origin: str,
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    missing: list[str],
    left_over: list[str],
) -> str:
    """One sentence on all that keeps a file from being a model's weights."""
    found, wanted = _looks_like(state), _looks_like(target)
    if found != wanted:
        hint = f"the file looks like {found}, the model is {wanted}"
    elif all(_is_head(name) for name in [*missing, *left_over]):
        hint = "only the classification head differs: load into num_classes=0, and reset_classifier gives a new one"
    else:
        hint = "the file may hold a part of a model, or another version of it"
    return (
        f"{origin} does not fit the model's {len(target)} tensors: "
        f"{troubles(state, target, missing, left_over)}; {hint}; "
        "allow_partial loads what fits, if anything does"
    )


def architecture_of(state: Mapping[str, Tensor]) -> str | None:
    """The name of the XCiT whose blocks a state dict holds, under the names of `read_state_dict`, timm's too."""
    measures = _measures(state)
    return architecture_like(*measures) if measures else None


def _measures(state: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """Depth, width and patch size of an XCiT; None for others."""
    kernels = [
        value
        for name, value in state.items()
        if value.ndim == 4 and re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", name)
    ]
    depth = _depth(state)
    return (depth, kernels[-1].shape[0], 2 ** len(kernels)) if kernels and depth else None


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})


def _looks_like(state: Mapping[str, Tensor]) -> str:
    """What architecture the names and shapes of a state dict give away, in plain words."""
    measures = _measures(state)
    if measures:
        depth, width, patch_size = measures
        return f"an XCiT of width {width}, depth {depth} and patch size {patch_size}"
    depth = _depth(state)
    if not depth or not all(state.get(name, torch.empty(())).ndim > 2 for name in _OF_A_VIT):
        return "neither an XCiT nor a ViT"
    width, patch_size = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    return f"a ViT of width {width}, depth {depth} and patch size {patch_size}"


def shape_in_words(tensor: Tensor) -> str:
    """`3x224x224`."""
    return "x".join(str(side) for side in tensor.shape)


def some(names: Iterable[Any], limit: int = 4) -> str:
    """The first of the names, and how many more there are."""
    shown = [str(name) for name in names]
    return "; ".join([*shown[:limit], *([f"{len(shown) - limit} more"] if len(shown) > limit else [])])
