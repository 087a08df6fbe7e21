"""Detection and instance segmentation with Mask R-CNN (XCiT, section 4.3): train, score, draw.

python -m dino.downstream.detect --data_path train2017 --annotations instances_train2017.json \
    --val_data_path val2017 --val_annotations instances_val2017.json --weights xcit_small_12_p16_384_dist --schedule 3x
python -m dino.downstream.detect --eval --val_data_path val2017 --val_annotations instances_val2017.json \
    --weights maskrcnn_xcit_small_12_p16.pth
python -m dino.downstream.detect --input 'photos/*.jpg' --weights runs/coco/best_model.pth --output_dir drawn

Imports no torch, so that `--help` answers at once; the run itself is in `dino.downstream.detection.task`.
"""

from dino.downstream.detection.options import DetectOptions
from dino.runtime.options import command


def _run(options: DetectOptions) -> None:
    from dino.downstream.detection.task import detect

    detect(options)


def main(prog: str = "dino-detect") -> None:
    command(
        DetectOptions,
        _run,
        prog=prog,
        description="Train, score or use a Mask R-CNN; under torchrun with several processes.",
    )


if __name__ == "__main__":
    main()
