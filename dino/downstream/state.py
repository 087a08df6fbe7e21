"""What a downstream run keeps in its checkpoint, under the names of XCiT's: `model`, `optimizer`, `model_ema`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from dino.runtime import checkpoint
from dino.runtime.options import UserError

MODEL_KEY, EMA_KEY = "model", "model_ema"
BEST_NAME = "best_model.pth"

_ADVICE = "give the options that it was trained with, or another --output_dir"


@dataclass(frozen=True)
class Place:
    """Where a run stands.

    Attributes:
        samples: pictures seen, over all processes and epochs.
        rounds: evaluated and logged.
        best: highest value so far of what the best network is chosen by; None before the first.
        totals: sums of the unfinished round's logged values, and how many steps they hold.
    """

    samples: int = 0
    rounds: int = 0
    best: float | None = None
    totals: Mapping[str, float] | None = None


@dataclass(frozen=True, eq=False)
class State:
    """All that changes with a step.

    Attributes:
        ema: moving average of the network; None = there is none.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None

    def pack(self, place: Place, *, args: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that a run needs to continue.

        Args:
            args: the options.
            facts: plain values that whoever uses the network needs, such as the names of its classes.
        """
        average = {EMA_KEY: self.ema.module.state_dict()} if self.ema else {}
        scale = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        return {
            MODEL_KEY: self.network.state_dict(),
            **average,
            "optimizer": self.optimizer.state_dict(),
            **scale,
            "epoch": place.rounds,
            "args": dict(args),
            "progress": {
                "samples": place.samples,
                "best": place.best,
                "totals": dict(place.totals or {}),
            },
            **facts,
        }

    def unpack(self, content: Mapping[str, Any], *, pictures_per_round: int) -> Place:
        """Fill all parts in place, either all of them or none.

        Args:
            pictures_per_round: for files of the original, which count finished epochs, from 0, and nothing else.

        Raises:
            UserError: the file belongs to another network, or lacks a part.
        """
        kinds = {MODEL_KEY: Mapping, "optimizer": Mapping, "epoch": int}
        missing = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
        if missing:
            raise UserError(
                f"the checkpoint has no {', '.join(missing)}, so no run can go on from it: start from its weights, "
                "with --weights and another --output_dir"
            )
        stored = content[MODEL_KEY]
        checkpoint.check_fits(self.network, stored, _ADVICE)
        averaged = content.get(EMA_KEY) or stored
        if self.ema:
            checkpoint.check_fits(self.ema.module, averaged, _ADVICE)
        ordered = checkpoint.optimizer_state(content["optimizer"], stored, self.network, self.optimizer)
        self.network.load_state_dict(stored)
        if self.ema:
            self.ema.module.load_state_dict(averaged)
        self.optimizer.load_state_dict(ordered)
        if self.scaler.is_enabled() and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        return _place(content, pictures_per_round)


def _place(content: Mapping[str, Any], pictures_per_round: int) -> Place:
    progress = content.get("progress")
    if progress is None:
        rounds = int(content["epoch"]) + 1
        return Place(samples=rounds * pictures_per_round, rounds=rounds)
    return Place(
        samples=int(progress["samples"]),
        rounds=int(content["epoch"]),
        best=progress.get("best"),
        totals=progress.get("totals") or None,
    )


def own_weights(folder: Path) -> str:
    """The file that a run has left in its folder: its best network's, else its last one's.

    Raises:
        UserError: there is none.
    """
    for name in (BEST_NAME, checkpoint.NAME):
        if (folder / name).is_file():
            return str(folder / name)
    raise UserError(f"there is no {BEST_NAME} in {folder}: name weights with --weights, or train first")
