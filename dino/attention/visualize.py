"""What every head looks at, in pictures and in videos, as files.

dino-attention --input photo.jpg --pretrained_weights dino_xcit_small_12_p16 --output_dir maps
dino-attention --input clip.mp4 --layout grid --pretrained_weights runs/mine/checkpoint.pth --output_dir maps

Imports torch only when there is something to compute.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino.attention.demo_inputs import write_demo_inputs
from dino.attention.drawing import Look
from dino.attention.gallery import Gallery, PageLook
from dino.attention.inputs import Input, find_inputs, printable
from dino.attention.record import write_record
from dino.attention.visualize_options import VisualizeOptions
from dino.evaluation.results import provenance
from dino.runtime.files import expanded, make_writable
from dino.runtime.options import UserError, command
from dino.runtime.progress import progress

if TYPE_CHECKING:
    from dino.attention.view import View

_DESCRIPTION = """Draw the class token's attention, head by head, in pictures and videos.

Of a picture: img.png (what the network saw), attn-head{j}.png, attn-mean.png, attn-max.png, sheet.png (all of
them, labelled), with --threshold mask_th{threshold}_head{j}.png, and other styles by --draw. Of a video: video.mp4,
and with --threshold mask_th{threshold}.mp4. index.html shows everything. Each of several inputs gets a subfolder of
its own name."""

_DEFAULT_THRESHOLD = 0.6

# What DINO's script resizes pictures to; here for ViTs only.
_VIT_SIZE = (480, 480)

# The embedded pictures and clip.
_DEMO = "demo"

ImageSize = int | tuple[int, int] | None


def main(prog: str = "dino-attention") -> None:
    command(VisualizeOptions, run, prog=prog, description=_DESCRIPTION)


def run(options: VisualizeOptions) -> None:
    """Draw everything that `options` name.

    Raises:
        UserError: nothing there, or none of it readable; a model without class attention; a folder that cannot be
            written to.
    """
    output_dir = expanded(options.folder, "--output_dir")
    if options.video_only:
        _make_video_only(options, output_dir)
        return
    places = [*options.input, *options.image_path]
    if _DEMO in places and not Path(_DEMO).exists():
        write_demo_inputs(output_dir / _DEMO)
        places = [str(output_dir / _DEMO) if place == _DEMO else place for place in places]
    inputs = find_inputs(
        places,
        output_dir,
        frame_folders=options.input_path,
        option="--image_path" if options.image_path else "--input",
    )
    make_writable(output_dir, "--output_dir")
    view = _open_view(options)
    threshold = _DEFAULT_THRESHOLD if options.threshold is None else options.threshold
    look = Look(view.patch_size, options.colormap, options.opacity, options.smooth, threshold)
    page_look = PageLook(
        threshold, options.colormap, options.opacity, options.smooth, options.shown, options.fixed_scale
    )
    gallery = Gallery(output_dir, "Attention", str(view.named), page_look) if options.gallery else None
    drawn, broken = _draw_all(inputs, options, view, look, gallery)
    if not drawn:
        others = {1: "", 2: "; nor can the other one be drawn"}
        raise UserError(
            broken[0] + others.get(len(inputs), f"; nor can the {len(inputs) - 1} others be drawn")
        )
    page = gallery.write() if gallery is not None else None
    _report(drawn, broken, page, output_dir)


def _draw_all(
    inputs: list[Input], options: VisualizeOptions, view: "View", look: Look, gallery: Gallery | None
) -> tuple[list[Input], list[str]]:
    """The inputs that were drawn, and sentences about those that cannot be read."""
    from dino.attention.patch_features import OutsideError
    from dino.attention.view import NoRoomError
    from dino.attention.visualize_pictures import PictureDrawing, UnusablePictureError
    from dino.attention.visualize_videos import UnreadableVideoError, VideoDrawing

    of_pictures = _picture_size(options, view)
    pictures = PictureDrawing(view, look, options, of_pictures, view.named.arch, gallery)
    videos = VideoDrawing(view, look, options, _asked_size(options), gallery)
    all_pictures = [each for each in inputs if each.kind == "picture"]
    if all_pictures:
        for sentence in _done_to_pictures(of_pictures, options):
            print(sentence)
    if view.unsettled:
        for sentence in pictures.settle(all_pictures):
            print(sentence)
    drawn: list[Input] = []
    broken: list[str] = []
    for each in progress(inputs, "attention", "input"):
        try:
            files = pictures.draw(each) if each.kind == "picture" else videos.draw(each)
        except (UnusablePictureError, UnreadableVideoError) as error:
            broken.append(str(error))
            continue
        except (NoRoomError, OutsideError) as error:
            broken.append(f"{printable(each.place)}: {error}")
            continue
        write_record(each.folder, each.place, files, _facts(view))
        drawn.append(each)
    return drawn, broken


def _open_view(options: VisualizeOptions) -> "View":
    from dino.attention.view import View
    from dino.runtime.distributed import pick_device, pick_precision
    from dino.runtime.named_backbone import open_backbone

    device = pick_device(options.device)
    named = open_backbone(
        options.arch,
        options.patch_size,
        options.pretrained_weights,
        key=options.checkpoint_key,
        allow_partial=options.allow_partial,
    )
    print(named, flush=True)
    view = View(
        named,
        device,
        pick_precision(options.precision, device),
        heads=options.heads,
        block=options.block,
        tile=options.tile,
        similar_to=(options.similar_to[0], options.similar_to[1]) if options.similar_to else None,
        pca=options.pca,
    )
    if "colors" in options.draw and not view.shows_single_heads:
        raise UserError(
            f"--draw colors gives every single head a colour of its own, and --heads {options.heads} has none: add "
            "all, auto, or numbers such as 0,3,5"
        )
    return view


def _asked_size(options: VisualizeOptions) -> ImageSize:
    """What --image_size, or its other name, asks for; None: as it is."""
    match options.image_size or options.resize:
        case (rows, cols):
            return rows, cols
        case (short_side,) if short_side:
            return short_side
    return None


def _picture_size(options: VisualizeOptions, view: "View") -> ImageSize:
    from dino.runtime.backbones import is_vit

    if options.image_size or options.resize or not is_vit(view.named.network):
        return _asked_size(options)
    return _VIT_SIZE


def _done_to_pictures(size: ImageSize, options: VisualizeOptions) -> list[str]:
    """Sentences on what is done to pictures before the network sees them."""
    said: list[str] = []
    if isinstance(size, tuple):
        said.append(f"pictures are resized to {size[0]} rows and {size[1]} columns of pixels")
        if not (options.image_size or options.resize):
            said[0] += ", as by DINO's script; --image_size 0 keeps them as they are"
    elif size is not None:
        said.append(f"pictures are resized to a short side of {size} pixels")
    if options.tile:
        said.append(f"pictures larger than {options.tile} pixels are computed in tiles of that side")
    return said


def _make_video_only(options: VisualizeOptions, output_dir: Path) -> None:
    from dino.attention.visualize_videos import make_video_only

    if len(options.input_path) != 1 or not Path(options.input_path[0]).is_dir():
        given = " ".join(options.input_path) or "nothing"
        raise UserError(
            f"--video_only makes a video of the folder of pictures that --input_path names, got {given}"
        )
    path = make_video_only(
        options.input_path[0], output_dir, fps=options.fps, video_format=options.video_format
    )
    print(f"Made {path}.")


def _facts(view: "View") -> dict[str, Any]:
    """What made the outputs, for their record."""
    report = view.named.report
    return {
        "arch": view.named.arch,
        "patch_size": view.patch_size,
        "pretrained_weights": view.named.source,
        "weights_sha256": report.sha256 if report else None,
        "block": view.block,
        **provenance(),
    }


def _report(drawn: list[Input], broken: list[str], page: Path | None, output_dir: Path) -> None:
    for sentence in broken:
        print(f"skipped: {sentence}")
    kinds = Counter("picture" if each.kind == "picture" else "video" for each in drawn)
    counts = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
    of = f" of {len(drawn) + len(broken)} inputs" if broken else ""
    print(f"Drew {counts}{of} into {output_dir}" + (f"; open {page}" if page else ""))


if __name__ == "__main__":
    main()
