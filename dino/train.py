"""Pre-train a backbone with DINO.

python -m dino.train --data_path my_pictures --output_dir runs/mine
torchrun --nproc_per_node=8 -m dino.train --data_path my_pictures --output_dir runs/mine

Imports no torch, so that `--help` answers at once; the run itself is in `dino.pretraining`.
"""

from dino.runtime.options import command
from dino.train_options import TrainOptions, preset_defaults


def _run(options: TrainOptions) -> None:
    from dino.pretraining import pretrain

    pretrain(options)


def main() -> None:
    command(
        TrainOptions,
        _run,
        prog="python -m dino.train",
        description="Pre-train a backbone with DINO; the same command under torchrun uses several processes.",
        defaults=preset_defaults,
    )


if __name__ == "__main__":
    main()
