"""Train, fine-tune or evaluate a classifier, with the recipe of XCiT (section 4.1).

python -m dino.downstream.classify --data_path photos --output_dir runs/photos --preset small --weights dino.pth
python -m dino.downstream.classify --eval --weights xcit_small_12_p16_224_dist --data_path imagenet
torchrun --nproc_per_node=8 -m dino.downstream.classify --model xcit_small_12_p16 --data_path imagenet --batch-size 128

Imports no torch, so that `--help` answers at once; the run itself is in `dino.downstream.classification.task`.
"""

from dino.downstream.classification.options import ClassifyOptions, preset_defaults
from dino.runtime.options import command


def _run(options: ClassifyOptions) -> None:
    from dino.downstream.classification.task import classify

    classify(options)


def main(prog: str = "dino-classify") -> None:
    command(
        ClassifyOptions,
        _run,
        prog=prog,
        description="Train, fine-tune or evaluate a classifier; under torchrun the same with several processes.",
        defaults=preset_defaults,
    )


if __name__ == "__main__":
    main()
