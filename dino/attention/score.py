"""Does attention find the object? Numbers for maps with ground-truth masks beside them.

python -m dino.attention.score --pretrained_weights checkpoint.pth --images JPEGImages --masks SegmentationObject

The command's protocol is the DINO paper's (section 4.2.2): the patches that hold 60 % of a head's attention against
the mask of each object, by Jaccard similarity; the best head for each object, averaged over the objects of a picture
and then over pictures. Imports torch only when there is something to compute.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dino.attention.ground_truth import MaskedPicture, check_same_shape, open_masks
from dino.attention.heads import FloatArray, HeadChoice, chosen_maps, parse_heads, pick_heads_by
from dino.attention.jaccard import score_picture
from dino.attention.render import ByteArray
from dino.attention.score_options import ScoreOptions, check
from dino.attention.score_table import AUTO, PictureScore, as_plain, as_text, best_single, means, write_csv
from dino.evaluation.results import provenance
from dino.runtime.files import expanded, make_writable, write_atomically
from dino.runtime.images import BrokenImageError, decode
from dino.runtime.options import UserError, command
from dino.runtime.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from dino.attention.view import View

# Pictures whose mirror images pick the heads of `auto`.
_PICTURES_TO_PICK_BY = 16

_SENTENCES_SHOWN = 5


@dataclass(frozen=True)
class _Scorer:
    """What the network sees of pictures, and how that compares with their objects.

    Args:
        image_size: that pictures are resized to, as by `maps.resize`; None: as they are.
    """

    view: "View"
    image_size: int | tuple[int, int] | None
    options: ScoreOptions

    def attend(self, image: ByteArray) -> FloatArray:
        """Maps (heads, rows, cols) of what was shown."""
        (maps_HRC,) = self.view.maps(image[None])
        return maps_HRC

    def shown(self, upright: "Image") -> ByteArray:
        from dino.attention.maps import resize

        return resize(upright, self.image_size)

    def readable(self, pictures: Sequence[MaskedPicture]) -> Iterator[ByteArray]:
        """What is shown of those that can be read.

        Raises:
            UserError: none can.
        """
        broken: list[BrokenImageError] = []
        for picture in pictures:
            try:
                upright = decode(picture.path, picture.name)
            except BrokenImageError as error:
                broken.append(error)
            else:
                yield self.shown(upright)
        if len(broken) == len(pictures):
            raise UserError(f"none of the {len(broken)} pictures that were tried can be read: {broken[0]}")

    def score(self, picture: MaskedPicture, choice: HeadChoice, picked: Sequence[int]) -> PictureScore | None:
        """The picture's score; None where it shows no object.

        Raises:
            BrokenImageError: the picture or its masks cannot be read, or do not fit.
        """
        objects = picture.read()
        upright = decode(picture.path, picture.name)
        check_same_shape(objects.void.shape, (upright.height, upright.width), picture.name)
        if not objects.masks:
            return None
        image = self.shown(upright)
        maps_HRC = self.attend(image)
        auto = chosen_maps(maps_HRC, HeadChoice(tuple(picked), mean=True))["mean"]
        return score_picture(
            picture.name,
            {AUTO: auto, **chosen_maps(maps_HRC, choice)},
            objects.union() if self.options.objects == "union" else objects,
            self.view.patch_size,
            keep=self.options.threshold,
            input_size=image.shape[:2],
        )


def main() -> None:
    command(
        ScoreOptions,
        run,
        prog="python -m dino.attention.score",
        description="Does attention find the objects? Jaccard similarity of every head with masks made by people.",
    )


def run(options: ScoreOptions) -> None:
    """Score the pictures that have masks; print the table, write score.json and score.csv.

    Raises:
        UserError: nothing to score; a model without class attention; a folder that cannot be written to.
    """
    image_size = check(options)
    found = open_masks(
        expanded(options.images, "--images"), expanded(options.masks, "--masks"), void=options.void
    )
    output_dir = expanded(options.output_dir, "--output_dir")
    make_writable(output_dir, "--output_dir")
    view = _open_view(options)
    choice = parse_heads(options.heads, view.head_count)
    scorer = _Scorer(view, image_size, options)
    pictures = _spread(found.pictures, options.max_pictures or len(found.pictures))
    samples = _spread(pictures, _PICTURES_TO_PICK_BY)
    seen = progress(scorer.readable(samples), "picking heads", "picture", total=len(samples))
    picked, how = pick_heads_by(seen, scorer.attend, view.patch_size)
    print(how)
    choice = replace(choice.filled(picked) if choice.auto else choice, mean=True)
    scores, broken = _score(pictures, scorer, choice, picked)
    left_out = [*found.left_out, *broken]
    for line in [*_some(left_out), _heading(scores, options), as_text(means(scores), picked)]:
        print(line)
    result = _result(scores, left_out, view, options)
    result["picked_heads"] = {"heads": picked, "how": how}
    text = json.dumps(result, indent=1) + "\n"
    path = output_dir / "score.json"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    write_csv(scores, output_dir / "score.csv")
    print(f"written to {path} and, picture by picture, score.csv")


def _open_view(options: ScoreOptions) -> "View":
    from dino.attention.view import View
    from dino.runtime.distributed import pick_device, pick_precision
    from dino.runtime.named_backbone import open_backbone

    device = pick_device(options.device)
    named = open_backbone(
        options.arch,
        options.patch_size,
        options.pretrained_weights,
        key=options.checkpoint_key,
        seed=options.seed,
    )
    print(named)
    return View(named, device, pick_precision(options.precision, device), block=options.block)


def _spread(pictures: list[MaskedPicture], most: int) -> list[MaskedPicture]:
    places = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int)
    return [pictures[place] for place in places]


def _score(
    pictures: Sequence[MaskedPicture], scorer: _Scorer, choice: HeadChoice, picked: Sequence[int]
) -> tuple[list[PictureScore], list[str]]:
    """The scores, and sentences on the pictures that have none."""
    scores: list[PictureScore] = []
    left_out: list[str] = []
    for picture in progress(pictures, "attention", "picture"):
        try:
            score = scorer.score(picture, choice, picked)
        except BrokenImageError as error:
            left_out.append(str(error))
            continue
        if score is None:
            left_out.append(f"{picture.name}: no object in it")
        else:
            scores.append(score)
    if not scores:
        raise UserError(f"no picture could be scored: {left_out[0]}")
    return scores, left_out


def _result(
    scores: list[PictureScore], left_out: list[str], view: "View", options: ScoreOptions
) -> dict[str, Any]:
    """What was found and how, as plain values."""
    from dino.runtime.backbones import tensors_sha256
    from dino.runtime.distributed import describe

    table = means(scores)
    return {
        "protocol": _heading(scores, options),
        "arch": view.named.arch,
        "weights": view.named.source,
        "tensors_sha256": tensors_sha256(view.named.network),
        "device": describe(view.device),
        "precision": view.precision,
        "options": asdict(options),
        "pictures": len(scores),
        "objects": sum(score.objects for score in scores),
        "left_out": left_out,
        "jaccard": as_plain(table),
        "best_single_head": best_single(table),
        **provenance(),
    }


def _some(left_out: list[str]) -> list[str]:
    shown = [f"left out: {sentence}" for sentence in left_out[:_SENTENCES_SHOWN]]
    more = len(left_out) - len(shown)
    return [*shown, f"left out: {more} more, all named in score.json"] if more else shown


def _heading(scores: Sequence[PictureScore], options: ScoreOptions) -> str:
    of = "each object" if options.objects == "each" else "all objects of a picture as one"
    return (
        f"Jaccard similarity in % (± standard error) of the patches that hold {options.threshold:g} of the "
        f"attention with {of}: {len(scores)} pictures, {sum(score.objects for score in scores)} masks"
    )


if __name__ == "__main__":
    main()
