"""Checkpoints on disk: written atomically, the one before kept, only tensors and plain values inside.

The layout is DINO's (`student`, `teacher`, `optimizer`, `epoch`, `args`, `dino_loss`), so that its own scripts
read our files and we resume from its; what exact resume needs besides lies under `progress`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino.runtime.files import write_atomically, writing
from dino.runtime.options import UserError
from xcit.weights import WeightsError, read_checkpoint

NAME = "checkpoint.pth"
PREVIOUS_NAME = "checkpoint.previous.pth"
# Complete, and newer than the others, for the moment in which they change places.
_FRESH_NAME = f".{NAME}.fresh"

# DINO saves modules that DistributedDataParallel wraps: always the student, and a teacher with batch norm.
_WRAPPED = "module."


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        epoch: epochs finished.
        samples: pictures of the unfinished epoch already seen, over all processes.
        best_knn: best k-NN accuracy so far in percent; -1 before the first.
        knn_random: that of the random network at the start; None = not measured.
        knn_init: that of the weights of `--init_from` at the start; None = not measured.
        pictures: in the set that it was trained on; 0 = not known.
        totals: sums of the unfinished epoch's logged values, and how many steps they hold.
    """

    epoch: int
    samples: int = 0
    best_knn: float = -1.0
    knn_random: float | None = None
    knn_init: float | None = None
    pictures: int = 0
    totals: Mapping[str, float] | None = None


def save_atomically(content: dict[str, Any] | Tensor, path: Path) -> None:
    """`torch.save` that leaves at `path` the old content or the new, whole.

    Raises:
        UserError: the disk is full or the folder cannot be written; `path` is unchanged.
    """

    def save(temporary: Path) -> None:
        # To an open file: the system's own reason is lost when torch opens it.
        with temporary.open("wb") as file:
            torch.save(content, file)

    write_atomically(path, save)


def save_latest(content: dict[str, Any], folder: Path) -> None:
    """`checkpoint.pth`, keeping the one before beside it.

    Raises:
        UserError: the disk is full or the folder cannot be written; no checkpoint is lost.
    """
    latest = folder / NAME
    fresh = folder / _FRESH_NAME
    save_atomically(content, fresh)
    with writing(latest):
        if latest.exists():
            _keep_as(folder / PREVIOUS_NAME, latest)
        fresh.replace(latest)


def _keep_as(previous: Path, latest: Path) -> None:
    """A second name for the file, so that whoever reads `latest` meanwhile, or after a kill, finds it."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(latest)
    except OSError:  # file systems without hard links
        latest.replace(previous)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint of ours or of the original, on the CPU. Runs no code from the file.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        return read_checkpoint(path)
    except WeightsError as error:
        raise UserError(str(error)) from error


def load_latest(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The checkpoint to resume from, if any, and a sentence when it is not the last one.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    for name in (NAME, _FRESH_NAME, PREVIOUS_NAME):
        if not (folder / name).exists():
            continue
        try:
            content = load(folder / name)
        except UserError as error:
            problems.append(str(error))
            continue
        if name == PREVIOUS_NAME and not problems:
            problems.append(f"there is no {folder / NAME}; to start anew remove {PREVIOUS_NAME} too")
        return content, f"{problems[0]}; resuming from {name}" if problems else None
    if problems:
        raise UserError(f"{'; '.join(problems)}; move it away to start anew")
    return None, None


def pack(
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    center: Tensor,
    *,
    progress: Progress,
    args: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Any]:
    """Everything a run needs to continue, in DINO's layout.

    Args:
        scaler: kept as `fp16_scaler` where it is in use, as DINO does.
    """
    teacher_prefix = _WRAPPED if _has_batch_norm(teacher) else ""
    scaler_state = {"fp16_scaler": scaler.state_dict()} if scaler and scaler.is_enabled() else {}
    return {
        "student": {_WRAPPED + name: value for name, value in student.state_dict().items()},
        "teacher": {teacher_prefix + name: value for name, value in teacher.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": progress.epoch,
        "args": dict(args),
        "dino_loss": {"center": center},
        "progress": {
            "samples": progress.samples,
            "best_knn": float(progress.best_knn),
            "knn_random": progress.knn_random,
            "knn_init": progress.knn_init,
            "pictures": progress.pictures,
            "totals": dict(progress.totals or {}),
        },
        **scaler_state,
    }


def unpack(
    content: Mapping[str, Any],
    student: nn.Module,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    center: Tensor,
    scaler: torch.amp.GradScaler | None = None,
) -> Progress:
    """Fill all parts in place from `content`; either all of them or none.

    Raises:
        UserError: the file belongs to another architecture, or lacks a part.
    """
    kinds = {"student": Mapping, "teacher": Mapping, "optimizer": Mapping, "epoch": int, "dino_loss": Mapping}
    missing = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if not missing and not isinstance(content["dino_loss"].get("center"), Tensor):
        missing = ["center"]
    if missing:
        raise UserError(
            f"the checkpoint has no {', '.join(missing)}: use --init_from to start from weights alone"
        )
    states = [_unwrapped(content["student"]), _unwrapped(content["teacher"])]
    for network, state in zip((student, teacher), states, strict=True):
        check_fits(
            network,
            state,
            "give the --arch, --out_dim and head options that it was trained with, or another --output_dir",
        )
    stored_center = content["dino_loss"]["center"]
    if stored_center.shape != center.shape:
        raise UserError(
            f"the checkpoint has {stored_center.shape[-1]} prototypes, --out_dim asks for {center.shape[-1]}"
        )
    ordered = optimizer_state(content["optimizer"], states[0], student, optimizer)
    student.load_state_dict(states[0])
    teacher.load_state_dict(states[1])
    optimizer.load_state_dict(ordered)
    center.copy_(stored_center)
    if scaler is not None and scaler.is_enabled() and content.get("fp16_scaler"):
        scaler.load_state_dict(content["fp16_scaler"])
    extra = content.get("progress", {})
    return Progress(
        epoch=int(content["epoch"]),
        samples=int(extra.get("samples", 0)),
        best_knn=float(extra.get("best_knn", -1.0)),
        knn_random=extra.get("knn_random"),
        knn_init=extra.get("knn_init"),
        pictures=int(extra.get("pictures", 0)),
        totals=extra.get("totals") or None,
    )


def _moments(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The original's LARS calls its momentum `mu`."""
    return {"momentum_buffer" if name == "mu" else name: value for name, value in stored.items()}


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_WRAPPED): value for name, value in state.items()}


def check_fits(network: nn.Module, state: Mapping[str, Tensor], advice: str) -> None:
    """Compare the names and shapes of a checkpoint's tensors with a network's.

    Args:
        advice: what to do where they differ.

    Raises:
        UserError: they differ; the first difference is named.
    """
    expected = network.state_dict()
    different = [
        f"{name} (file: {_shape(state.get(name))}, model: {_shape(expected.get(name))})"
        for name in [*expected, *(set(state) - set(expected))]
        if _shape(state.get(name)) != _shape(expected.get(name))
    ]
    if different:
        raise UserError(
            f"the checkpoint is of another architecture: {len(different)} tensors differ, first "
            f"{different[0]}; {advice}"
        )


def _shape(value: Tensor | None) -> str:
    return "absent" if value is None else "x".join(map(str, value.shape)) or "scalar"


def optimizer_state(
    stored: Mapping[str, Any],
    stored_student: Mapping[str, Tensor],
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """An optimizer's stored state under our numbering of the parameters.

    Optimizers number parameters by their order in the network, which may differ between implementations that agree
    on the names; the order of the stored student's tensors tells the file's.

    Raises:
        UserError: it is of other parameters.
    """
    name_of = {id(parameter): name for name, parameter in student.named_parameters()}
    group_of = {
        name_of[id(parameter)]: index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    number = {name: index for index, name in enumerate(group_of)}
    theirs = sorted((name for name in stored_student if name in group_of), key=lambda name: group_of[name])
    own = optimizer.state_dict()
    state, groups = stored.get("state"), stored.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise UserError(
            "the checkpoint's optimizer has no state: use --init_from to start from weights alone"
        )
    count = sum(len(group["params"]) for group in groups)
    if count != len(theirs):
        raise UserError(
            f"the checkpoint's optimizer holds {count} parameters, this run trains {len(theirs)}; "
            "--norm_last_layer must be as it was"
        )
    if len(groups) != len(own["param_groups"]):
        raise UserError(
            f"the checkpoint's optimizer has {len(groups)} groups of parameters, this run's has "
            f"{len(own['param_groups'])}: use --init_from to start from weights alone"
        )
    return {
        "state": {number[theirs[int(index)]]: _moments(value) for index, value in state.items()},
        "param_groups": [
            {**ours, **{name: float(kept[name]) for name in ("lr", "weight_decay") if name in kept}}
            for ours, kept in zip(own["param_groups"], groups, strict=True)
        ],
    }
