"""The backbone that a benchmark judges: built, filled with its weights, and described.

Imports no torch, so that `--help` answers at once.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from dino.evaluation.evaluation_options import BackboneOptions
from dino.runtime.options import UserError

if TYPE_CHECKING:
    import torch

    from dino.evaluation.extraction import Extractor
    from dino.evaluation.feature_cache import Origin

Options = TypeVar("Options", bound=BackboneOptions)

_LEAST = {"patch_size": 1, "image_size": 1, "batch_size_per_gpu": 1, "num_workers": 0, "seed": 0}


@dataclass(frozen=True, eq=False)
class Subject:
    """The backbone that is judged, on its device, and what is known of it.

    Attributes:
        extractor: shows it pictures, prepared as the options say.
        origin: what it is.
        facts: the same and the settings, as plain values for `results.json`.
    """

    extractor: "Extractor"
    origin: "Origin"
    facts: dict[str, Any]


def create_subject(options: BackboneOptions, device: "torch.device") -> Subject:
    """Build the backbone and load its weights; the main process says what it does.

    Raises:
        UserError: anything wrong with the model's name, the weights or the device.
    """
    from dino.evaluation.extraction import Extractor, Preparation
    from dino.evaluation.feature_cache import Origin
    from dino.runtime import distributed
    from dino.runtime.backbones import check_side, tensors_sha256
    from dino.runtime.named_backbone import open_backbone

    _check_numbers(options)
    options = resolve_options(options)
    named = open_backbone(
        options.arch,
        options.patch_size,
        options.pretrained_weights,
        key=options.checkpoint_key,
        allow_partial=options.allow_partial,
        seed=options.seed,
    )
    check_side(named.network, options.image_size, "--image_size")
    say(str(named))
    preparation = Preparation(
        size=options.image_size, precision=distributed.pick_precision(options.precision, device)
    )
    extractor = Extractor(
        named.network.to(device),
        preparation,
        batch_size=options.batch_size_per_gpu,
        device=device,
        num_workers=distributed.share_cores(device, options.num_workers),
    )
    origin = Origin(
        options.arch,
        tensors_sha256(named.network),
        named.source,
        named.report.sha256 if named.report else None,
    )
    facts = {
        **asdict(origin),
        "seed": options.seed,
        "device": distributed.describe(device),
        "processes": distributed.world_size(),
        "preprocessing": {**asdict(preparation), "as_stored": options.as_stored},
        "options": asdict(options),
    }
    return Subject(extractor, origin, facts)


def _check_numbers(options: BackboneOptions) -> None:
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be {least} or more, got {getattr(options, name)}")
    if options.seed >= 2**63:
        raise UserError(f"--seed must be below 2^63, got {options.seed}")


def resolve_options(options: Options) -> Options:
    """The same with the architecture and the weights that `auto` and an empty name stand for.

    Raises:
        UserError: the weights cannot be had, or there are no published ones.
    """
    from dino.runtime.named_backbone import resolve_weights

    arch, patch_size, source = resolve_weights(options.arch, options.patch_size, options.pretrained_weights)
    return replace(options, arch=arch, patch_size=patch_size, pretrained_weights=source)


def say(line: str) -> None:
    """Print a line from the main process."""
    from dino.runtime.distributed import is_main

    if is_main():
        print(line, flush=True)
