"""Semantic segmentation with Semantic FPN or UPerNet (XCiT, section 4.3): train, score, draw.

python -m dino.downstream.segment --data_path camvid --output_dir runs/camvid --weights dino_xcit_small_12_p16
python -m dino.downstream.segment --eval --data_path ADEChallengeData2016 --weights sem_fpn_xcit_small_12_p16.pth
python -m dino.downstream.segment --input 'photos/*.jpg' --weights runs/camvid/best_model.pth --output_dir drawn

Imports no torch, so that `--help` answers at once; the run itself is in `dino.downstream.segmentation.task`.
"""

from dino.downstream.segmentation.options import SegmentOptions
from dino.runtime.options import command


def _run(options: SegmentOptions) -> None:
    from dino.downstream.segmentation.task import segment

    segment(options)


def main(prog: str = "dino-segment") -> None:
    command(
        SegmentOptions,
        _run,
        prog=prog,
        description="Train, score or use a semantic segmentation network; under torchrun with several processes.",
    )


if __name__ == "__main__":
    main()
