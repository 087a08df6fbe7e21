"""Does attention find the object? Numbers for maps with ground-truth masks beside them.

python -m dino.attention.score --pretrained_weights checkpoint.pth --images JPEGImages --masks SegmentationObject

The command's protocol is the DINO paper's (section 4.2.2): the patches that hold 60 % of a head's attention against
the mask of each object, by Jaccard similarity; the best head for each object, averaged over the objects of a picture
and then over pictures. Imports torch only when there is something to compute.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from dino.attention.ground_truth import MaskedPicture, Objects, check_same_shape, open_masks
from dino.attention.heads import FloatArray, HeadChoice, chosen_maps, parse_heads, pick_heads_by
from dino.attention.render import BoolArray, ByteArray, mass_mask
from dino.attention.score_options import ScoreOptions, check
from dino.attention.score_table import (
    AUTO,
    BEST,
    DISC,
    WHOLE,
    PictureScore,
    as_plain,
    as_text,
    best_single,
    means,
    write_csv,
)
from dino.evaluation.results import provenance
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.images import BrokenImageError, decode
from dino.runtime.options import UserError, command
from dino.runtime.progress import progress

# Pictures whose mirror images pick the heads of `auto`.
_PICTURES_TO_PICK_BY = 16

_SENTENCES_SHOWN = 5


def jaccard(
    maps_HRC: NDArray[Any],
    mask: BoolArray,
    patch_size: int,
    *,
    keep: float = 0.6,
    ignore: BoolArray | None = None,
    input_size: tuple[int, int] | None = None,
) -> NDArray[np.float64]:
    """Intersection over union of the mask and of the patches that hold `keep` of a map's mass, per head (heads,).

    Pixels are those of the mask; each belongs to the patch that holds its centre. Where neither the mask nor the
    map has a pixel, it is 0, as in scikit-learn.

    Args:
        maps_HRC: weights (heads, rows, cols), one per patch.
        mask: (rows, cols), true on the object, over the whole picture at any resolution.
        patch_size: side of a patch in pixels of the network's input.
        keep: part of the mass, in [0, 1]; see `render.mass_mask`.
        ignore: (rows, cols), true where a pixel counts on neither side.
        input_size: (rows, cols) of the network's input, when that is not the mask's size.

    Raises:
        ValueError: there is not one weight per patch.
    """
    size = input_size or (mask.shape[0], mask.shape[1])
    grid = _grid(maps_HRC, size, patch_size)
    kept = mass_mask(maps_HRC, keep).reshape(len(maps_HRC), -1)
    row, col = (
        ((np.arange(pixels) + 0.5) * side / pixels).astype(int) // patch_size
        for pixels, side in zip(mask.shape, size, strict=True)
    )
    patch = row[:, None] * grid[1] + col
    judged = np.ones(mask.shape, bool) if ignore is None else ~ignore
    pixels = np.bincount(patch[judged], minlength=kept.shape[1])
    on_object = np.bincount(patch[judged & mask], minlength=kept.shape[1])
    intersection = kept @ on_object
    union = kept @ pixels + on_object.sum() - intersection
    return np.asarray(intersection / np.maximum(union, 1))


def object_score(
    maps: NDArray[Any],
    mask: NDArray[np.bool_],
    patch_size: int,
    *,
    input_size: tuple[int, int] | None = None,
) -> NDArray[np.float64]:
    """Attention mass on the object over the object's part of the area, per head (heads,): 1 is chance.

    The mask is averaged over the area of each patch: a patch's weight lies evenly on what it shows of the
    picture. Scores range from 0 to the reciprocal of the object's part of the area; a map without mass has 0.

    Args:
        maps: weights (heads, rows, cols), one per patch; their sum does not matter.
        mask: (rows, cols), true on the object, over the whole picture at any resolution.
        patch_size: side of a patch in pixels of the network's input.
        input_size: (rows, cols) of the network's input, when that is not the mask's size.

    Raises:
        ValueError: the mask is empty, or there is not one weight per patch.
    """
    size = input_size or (mask.shape[0], mask.shape[1])
    weights = np.asarray(maps, np.float64)
    grid = _grid(weights, size, patch_size)
    if not mask.any():
        raise ValueError("the mask is empty: there is no object to score")
    over_rows, over_cols = (
        _overlap(patches, patch_size * pixels / side, pixels)
        for patches, pixels, side in zip(grid, mask.shape, size, strict=True)
    )
    visible = np.outer(over_rows.sum(axis=1), over_cols.sum(axis=1))
    on_object = (over_rows @ mask @ over_cols.T) / visible
    mass = weights.sum(axis=(1, 2))
    part = (weights * on_object).sum(axis=(1, 2)) / np.where(mass > 0, mass, 1.0)
    return np.asarray(part / mask.mean())


def _grid(maps: NDArray[Any], size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    grid = (-(-size[0] // patch_size), -(-size[1] // patch_size))
    if maps.shape[1:] != grid:
        raise ValueError(f"an input of {size} has {grid} patches of {patch_size}, got maps {maps.shape}")
    return grid


def _overlap(patches: int, side: float, pixels: int) -> NDArray[np.float64]:
    """Length that patch i, of that side, shares with pixel j: (patches, pixels)."""
    starts = np.arange(patches)[:, None] * side
    pixel = np.arange(pixels)[None]
    return np.clip(np.minimum(starts + side, pixel + 1) - np.maximum(starts, pixel), 0.0, 1.0)


def score_picture(
    name: str,
    layers: dict[str, FloatArray],
    objects: Objects,
    patch_size: int,
    *,
    keep: float = 0.6,
    input_size: tuple[int, int],
) -> PictureScore:
    """Jaccard similarity of each map, and of the masks that chance offers, with the objects of one picture.

    Args:
        layers: maps (rows, cols) by name, as `heads.chosen_maps` gives them; the best is sought among the heads.
        objects: at least one.
    """
    maps = np.stack(list(layers.values()))
    heads = [index for index, layer in enumerate(layers) if layer.startswith("head")]
    judged = ~objects.void
    rows: list[dict[str, float]] = []
    for mask in objects.masks.values():
        similar = jaccard(
            maps, mask, patch_size, keep=keep, ignore=objects.void, input_size=input_size
        ).tolist()
        best = {BEST: max(similar[index] for index in heads)} if heads else {}
        disc = _disc(mask.shape, int(mask.sum())) & judged
        object_only = mask & judged
        chance = {
            WHOLE: float(object_only.sum() / max(judged.sum(), 1)),
            DISC: float((disc & mask).sum() / max((disc | object_only).sum(), 1)),
        }
        rows.append(best | dict(zip(layers, similar, strict=True)) | chance)
    return PictureScore(name, len(rows), {key: float(np.mean([row[key] for row in rows])) for key in rows[0]})


def _disc(size: tuple[int, ...], area: int) -> BoolArray:
    """The `area` pixels that are nearest to the middle."""
    row, col = (np.arange(side) - (side - 1) / 2 for side in size)
    distance = row[:, None] ** 2 + col**2
    nearest = np.zeros(distance.size, bool)
    nearest[np.argsort(distance, axis=None, kind="stable")[:area]] = True
    return nearest.reshape(distance.shape)


@dataclass(frozen=True)
class _Viewer:
    """What the network sees of a picture, (rows, cols, 3), and its maps of that, (heads, rows, cols)."""

    show: Callable[[Image], ByteArray]
    attend: Callable[[ByteArray], FloatArray]
    patch_size: int


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
    from dino.attention.maps import attention_maps, patch_side, resize
    from dino.runtime.backbones import open_backbone, tensors_sha256
    from dino.runtime.distributed import describe, pick_device, pick_precision

    image_size = check(options)
    found = open_masks(Path(options.images).expanduser(), Path(options.masks).expanduser(), void=options.void)
    output_dir = Path(options.output_dir).expanduser()
    make_writable(output_dir, "--output_dir")
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    named = open_backbone(
        options.arch,
        options.patch_size,
        options.pretrained_weights,
        key=options.checkpoint_key,
        seed=options.seed,
    )
    print(named)
    network = named.network.to(device)

    def attend(image: ByteArray) -> FloatArray:
        maps_BHRC = attention_maps(
            network, image[None], block=options.block, device=device, precision=precision
        )
        return maps_BHRC[0]

    viewer = _Viewer(lambda picture: resize(picture, image_size), attend, patch_side(network))
    pictures = _spread(found.pictures, options.max_pictures or len(found.pictures))
    samples = _readable(_spread(pictures, _PICTURES_TO_PICK_BY), viewer)
    choice = parse_heads(options.heads, len(viewer.attend(samples[0])))
    seen = progress(samples, "picking heads", "picture")
    picked, how = pick_heads_by(seen, viewer.attend, viewer.patch_size)
    print(how)
    choice = replace(choice.filled(picked) if choice.auto else choice, mean=True)
    scores, broken = _score(pictures, viewer, choice, picked, options)
    left_out = [*found.left_out, *broken]
    print(*_some(left_out), sep="\n", end="\n" * bool(left_out))

    table = means(scores)
    objects = sum(score.objects for score in scores)
    print(_heading(len(scores), objects, options), as_text(table, picked), sep="\n")
    result = {
        "protocol": _heading(len(scores), objects, options),
        "arch": named.arch,
        "weights": named.source,
        "tensors_sha256": tensors_sha256(network),
        "device": describe(device),
        "precision": precision,
        "options": asdict(options),
        "pictures": len(scores),
        "objects": objects,
        "left_out": left_out,
        "jaccard": as_plain(table),
        "best_single_head": best_single(table),
        "picked_heads": {"heads": picked, "how": how},
        **provenance(),
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(
        output_dir / "score.json", lambda temporary: temporary.write_text(text, encoding="utf-8")
    )
    write_csv(scores, output_dir / "score.csv")
    print(f"written to {output_dir / 'score.json'} and, picture by picture, score.csv")


def _spread(pictures: list[MaskedPicture], most: int) -> list[MaskedPicture]:
    places = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int)
    return [pictures[place] for place in places]


def _readable(pictures: Sequence[MaskedPicture], viewer: _Viewer) -> list[ByteArray]:
    images: list[ByteArray] = []
    broken: list[BrokenImageError] = []
    for picture in pictures:
        try:
            images.append(viewer.show(decode(picture.path, picture.name)))
        except BrokenImageError as error:
            broken.append(error)
    if not images:
        raise UserError(f"none of the {len(broken)} pictures that were tried can be read: {broken[0]}")
    return images


def _score(
    pictures: Sequence[MaskedPicture],
    viewer: _Viewer,
    choice: HeadChoice,
    picked: Sequence[int],
    options: ScoreOptions,
) -> tuple[list[PictureScore], list[str]]:
    """The scores, and sentences on the pictures that have none."""
    scores: list[PictureScore] = []
    left_out: list[str] = []
    for picture in progress(pictures, "attention", "picture"):
        try:
            objects = picture.read()
            upright = decode(picture.path, picture.name)
            check_same_shape(objects.void.shape, (upright.height, upright.width), picture.name)
        except BrokenImageError as error:
            left_out.append(str(error))
            continue
        if not objects.masks:
            left_out.append(f"{picture.name}: no object in it")
            continue
        image = viewer.show(upright)
        maps_HRC = viewer.attend(image)
        auto = chosen_maps(maps_HRC, HeadChoice(tuple(picked), mean=True))["mean"]
        scores.append(
            score_picture(
                picture.name,
                {AUTO: auto, **chosen_maps(maps_HRC, choice)},
                objects.union() if options.objects == "union" else objects,
                viewer.patch_size,
                keep=options.threshold,
                input_size=image.shape[:2],
            )
        )
    if not scores:
        raise UserError(f"no picture could be scored: {left_out[0]}")
    return scores, left_out


def _some(left_out: list[str]) -> list[str]:
    shown = [f"left out: {sentence}" for sentence in left_out[:_SENTENCES_SHOWN]]
    more = len(left_out) - len(shown)
    return [*shown, f"left out: {more} more, all named in score.json"] if more else shown


def _heading(pictures: int, objects: int, options: ScoreOptions) -> str:
    of = "each object" if options.objects == "each" else "all objects of a picture as one"
    return (
        f"Jaccard similarity in % (± standard error) of the patches that hold {options.threshold:g} of the "
        f"attention with {of}: {pictures} pictures, {objects} masks"
    )


if __name__ == "__main__":
    main()
