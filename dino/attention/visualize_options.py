"""The options of `dino-attention`. Imports no torch, so that `--help` answers at once."""

import math
from dataclasses import dataclass

from dino.attention.drawing import STYLES
from dino.attention.render import palette
from dino.runtime.options import AUTO, UserError, option
from dino.video.writer import FORMATS

LAYOUTS = ("overlay", "side-by-side", "grid", "separate")
NORMALIZE = ("clip", "running", "frame")

_COLORMAP = "inferno"


@dataclass(frozen=True)
class VisualizeOptions:
    """The flags of DINO's visualize_attention.py and of its video_generation.py, and new ones."""

    input: tuple[str, ...] = option(
        (),
        "Pictures, videos, folders (searched through), patterns such as 'photos/*.jpg', URLs, numbers of cameras; "
        "demo = embedded ones.",
    )
    image_path: tuple[str, ...] = option((), "The same, as DINO's visualize_attention.py calls it.")
    input_path: tuple[str, ...] = option(
        (), "A video, or a folder of frames, which is one video; as DINO's video_generation.py calls it."
    )
    output_dir: str = option(".", "Folder to write to.")
    output_path: str = option("", "The same, as DINO's video_generation.py calls it; empty = --output_dir.")

    arch: str = option(
        AUTO,
        "Backbone: an XCiT name, vit_tiny|small|base, or a timm ViT; auto = what the weights say that they are "
        "for, and where they do not say, vit_small.",
    )
    patch_size: int = option(8, "Side of a patch in pixels, for vit_* only; other names carry theirs.")
    pretrained_weights: str = option(
        "",
        "Weights: published name, file or URL; random = a random network; empty = the published DINO weights of "
        "--arch.",
    )
    checkpoint_key: str = option("teacher", "Which network of a training checkpoint: teacher or student.")
    allow_partial: bool = option(False, "Accept weights for less than the whole backbone.")
    device: str = option("auto", "auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:N or mps.")
    precision: str = option(
        "auto",
        "Of the network; auto = bf16 where it is fast, else fp32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )

    image_size: tuple[int, ...] = option(
        (),
        "Resize to rows and columns in pixels, or one number for the short side; 0 = as it is. None = as it is, but "
        "pictures for a ViT, whose time grows with the square of their pixels, to 480 480 as in DINO's script. JPEGs "
        "of more than 128 million pixels need it.",
    )
    resize: tuple[int, ...] = option((), "The same, as DINO's video_generation.py calls it.")
    tile: int = option(
        0,
        "Pixels: compute an XCiT's tokens in tiles of this side, for pictures too large for the memory; 0 = whole.",
    )
    block: int = option(-1, "Which class-attention block of XCiT, or block of a ViT; -1 = the last.")
    heads: str = option(
        "all",
        "all (each head, mean and max), mean, max, numbers such as 0,3,5, auto (picked without labels); several "
        "with commas between them, and beside numbers mean and max are of these heads. The page begins with them.",
    )

    draw: tuple[str, ...] = option(
        (),
        f"Styles, of {', '.join(STYLES)}. None = heat for pictures; for videos what suits the layout.",
    )
    threshold: float | None = option(
        None,
        "Part of the attention that masks, cut-outs and head colours keep, by the fewest patches, 0 to 1; given, "
        "masks are drawn too. None = 0.6 where one is needed.",
    )
    colormap: str = option(_COLORMAP, "Any of matplotlib's colormaps.")
    opacity: float = option(0.6, "Of overlays, 0 to 1.")
    smooth: bool = option(False, "Interpolate between patches instead of drawing each as a square.")
    percentiles: tuple[float, ...] = option(
        (0.0, 99.5),
        "Low and high, 0 to 100, of the weights that are shown darkest and brightest; 0 100, as in DINO's script, "
        "lets a few outlier patches darken all others.",
    )
    scale: tuple[float, ...] = option(
        (),
        "A fixed scale instead: low and high in multiples of an even share of attention, such as 0 5. None = by "
        "percentiles.",
    )
    npz: bool = option(False, "Also write maps.npz, every head's raw weights, for pictures.")
    gallery: bool = option(True, "Write index.html, a page that shows everything.")
    similar_to: tuple[int, ...] = option(
        (),
        "x and y in pixels of img.png: also draw how similar the features of all patches are to those of the patch "
        "there (in a video, of its first frame). Not attention. None = off.",
    )
    pca: bool = option(
        False, "Also draw the first three principal components of the patch features. Not attention."
    )

    layout: str = option(
        "overlay",
        "Of videos: attention over the frames; beside them; a grid of frame, mean and all heads; or a file for each.",
        choices=LAYOUTS,
    )
    normalize: str = option(
        "clip",
        "Colour scale of videos: one for the clip (two passes), one that follows slowly, or each frame's own, which "
        "flickers.",
        choices=NORMALIZE,
    )
    start: float = option(0.0, "Of a video, in seconds.")
    end: float = option(0.0, "Of a video, in seconds from its beginning; 0 = to its end.")
    stride: int = option(1, "Take every so many frames; the video lasts as long.")
    size: int = option(
        0, "Longest side in pixels of the video that is written; 0 = frames as they are, a grid at most 1920."
    )
    fps: float = option(30.0, "Frames per second of a folder of frames; videos keep their own.")
    video_format: str = option("mp4", "H.264 in mp4, avi, gif, or a folder of png.", choices=FORMATS)
    keep_audio: bool = option(False, "Keep a video's sound, in mp4 and avi.")
    video_only: bool = option(False, "Only make a video of the pictures in the folder --input_path.")

    @property
    def shown(self) -> tuple[float, float]:
        """`percentiles` as a pair."""
        return self.percentiles[0], self.percentiles[1]

    @property
    def fixed_scale(self) -> tuple[float, float] | None:
        """`scale` as a pair; None where there is none."""
        return (self.scale[0], self.scale[1]) if self.scale else None

    @property
    def folder(self) -> str:
        """Where outputs go, by whichever name it was given."""
        return self.output_path or self.output_dir

    def __post_init__(self) -> None:
        """Raises: UserError: a value that cannot be."""
        _check_colormap(self.colormap)
        _check_part("threshold", self.threshold)
        _check_part("opacity", self.opacity)
        _check_size("image_size", self.image_size)
        _check_size("resize", self.resize)
        for name, least in (
            ("start", 0),
            ("end", 0),
            ("stride", 1),
            ("size", 0),
            ("tile", 0),
            ("patch_size", 1),
        ):
            if not getattr(self, name) >= least:
                raise UserError(f"--{name} must be {least} or more, got {getattr(self, name)}")
        if self.end and self.end <= self.start:
            raise UserError(
                f"--end {self.end:g} is not after --start {self.start:g}; both are seconds, 0 for no end"
            )
        if not 0 < self.fps < math.inf:
            raise UserError(f"--fps must be more than 0, got {self.fps}")
        for style in self.draw:
            if style not in STYLES:
                raise UserError(f"--draw {style}: there are {', '.join(STYLES)}")
        _check_pair("percentiles", self.percentiles, 0, 100)
        if self.scale:
            _check_pair("scale", self.scale, -math.inf, math.inf)
        if self.similar_to and len(self.similar_to) != 2:
            raise UserError(f"--similar_to takes x and y in pixels, got {_words(self.similar_to)}")
        if self.image_size and self.resize:
            raise UserError("--image_size and --resize are two names of one option; give one")


def _check_colormap(name: str) -> None:
    if name != _COLORMAP:  # which there is: matplotlib, which knows them all, takes too long for --help
        palette(name)


def _check_part(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"--{name} is a part, between 0 and 1, got {value}")


def _check_size(name: str, sides: tuple[int, ...]) -> None:
    if sides != (0,) and (len(sides) > 2 or any(side < 1 for side in sides)):
        raise UserError(f"--{name} takes one or two numbers of pixels, at least 1, got {_words(sides)}")


def _check_pair(name: str, values: tuple[float, ...], least: float, most: float) -> None:
    if not (len(values) == 2 and least <= values[0] < values[1] <= most):
        between = f" between {least} and {most}" if math.isfinite(least) else ""
        raise UserError(f"--{name} takes a low and a higher number{between}, got {_words(values)}")


def _words(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
