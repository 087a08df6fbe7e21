"""What `python -m dino.attention.score` can be asked. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass

from dino.attention.ground_truth import VOID
from dino.runtime.options import UserError, option


@dataclass(frozen=True)
class ScoreOptions:
    images: str = option("", "folder of pictures, searched through")
    masks: str = option(
        "",
        "folder of mask files with the pictures' names (a pixel is the number of its object, 0 the background, as in "
        "Pascal VOC), or a COCO file (.json)",
    )
    arch: str = option(
        "auto", "XCiT name, vit_tiny, vit_small, vit_base, or a timm ViT; auto: what the weights are for"
    )
    patch_size: int = option(16, "side of a patch in pixels, for vit_* only: the other names carry theirs")
    pretrained_weights: str = option(
        "", "file, URL or name of published weights; random: a baseline; empty: DINO's of --arch"
    )
    checkpoint_key: str = option("teacher", "part of a training checkpoint to take: teacher or student")
    image_size: tuple[int, ...] = option(
        (),
        "pixels that the network sees: rows and columns, or one number for the short side; none: the picture's "
        "own size. Masks are compared at their own",
    )
    threshold: float = option(0.6, "part of the attention that a mask keeps, above 0 and up to 1")
    heads: str = option("all", "which heads: all, auto, mean, max, or numbers such as 0,3,5")
    block: int = option(-1, "which block's attention; -1: the last")
    objects: str = option(
        "each",
        "each: every object alone, with the best head for it, as in the DINO paper; union: all as one",
        choices=("each", "union"),
    )
    void: int = option(
        VOID, "number of the pixels in mask files that nobody has judged, which are left out; -1: none"
    )
    max_pictures: int = option(0, "score this many, spread evenly over the folder; 0: all")
    device: str = option("auto", "auto, cuda, mps or cpu")
    precision: str = option(
        "auto", "of the network; auto: bf16 where it is fast", choices=("auto", "fp32", "bf16", "fp16")
    )
    seed: int = option(0, "of random weights")
    output_dir: str = option(".", "folder for score.json and score.csv")


def check(options: ScoreOptions) -> int | tuple[int, int] | None:
    """The size that the network sees, as `maps.resize` takes it.

    Raises:
        UserError: an option is missing or has an impossible value.
    """
    for name in ("images", "masks"):
        if not getattr(options, name):
            raise UserError(f"--{name} is missing; --help says what it takes")
    if not 0 < options.threshold <= 1:
        raise UserError(
            f"--threshold is a part of the attention, above 0 and up to 1, got {options.threshold:g}"
        )
    if options.max_pictures < 0:
        raise UserError(f"--max_pictures must be 0 (all) or more, got {options.max_pictures}")
    if options.void == 0:
        raise UserError("--void 0: 0 is the background; -1 means that everything is judged")
    size = options.image_size
    if len(size) > 2 or any(side < 1 for side in size):
        raise UserError(
            f"--image_size takes one or two numbers of pixels, at least 1, got {' '.join(map(str, size))}"
        )
    return None if not size else size[0] if len(size) == 1 else (size[0], size[1])
