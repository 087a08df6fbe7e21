"""Which heads to show: those that are asked for by number, their mean and maximum, or a choice made without labels.

    choice = parse_heads("auto,mean", count=8)
    if choice.auto:
        numbers, how = pick_heads_by(pictures, attend, patch_size)
        choice = choice.filled(numbers)
    layers = chosen_maps(maps_HRC, choice)          # {"mean": (rows, cols), "head3": (rows, cols), ...}

H heads, R and C rows and columns of patches.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.runtime.options import UserError

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

_ALLOWED = "all, mean, max, auto, or numbers of heads such as 0,3,5; several with commas between them"

# Heads with at least this part of the best one's score are picked beside it: heads find different parts of an
# object, so that the mean of good ones is better than each alone, and a poor one spoils it.
_NEARLY_AS_GOOD = 0.5

# 1 - entropy / ln(patches). An untrained head is a hundred times more even than that, a trained one above it.
_LEAST_FOCUS = 0.01

_LEAST_SCORE = 0.1


@dataclass(frozen=True)
class HeadChoice:
    """What to show of a stack of heads.

    Args:
        numbers: heads drawn one by one, in the order asked for.
        mean: also the mean over `numbers`; without numbers, over all heads.
        maximum: the same with the largest weight of every patch.
        auto: `numbers` still lack what `pick_heads` picks; see `filled`.
    """

    numbers: tuple[int, ...] = ()
    mean: bool = False
    maximum: bool = False
    auto: bool = False

    def filled(self, picked: Sequence[int]) -> "HeadChoice":
        """The choice with the picked heads in place of `auto`, behind those that were asked for by number."""
        return replace(self, numbers=tuple(dict.fromkeys([*self.numbers, *picked])), auto=False)


def parse_heads(spec: str, count: int) -> HeadChoice:
    """What `--heads` asks for, of a model with `count` heads.

    `all` is every head, the mean and the maximum; `mean`, `max`, `auto` and numbers stand for themselves and are
    combined by commas: `mean,0,3` is heads 0 and 3 and the mean of these two, `mean` alone that of all heads.

    Raises:
        UserError: a head that the model does not have, or a word that means nothing.
    """
    words = [word.strip().lower() for word in spec.split(",")]
    numbers: list[int] = []
    for word in words:
        if word == "all":
            numbers += range(count)
        elif re.fullmatch(r"-?\d+", word):
            numbers.append(_existing(int(word), count))
        elif word not in ("mean", "max", "auto"):
            raise UserError(f"--heads {spec or '(empty)'}: '{word}' is none of {_ALLOWED}")
    return HeadChoice(
        numbers=tuple(dict.fromkeys(numbers)),
        mean="mean" in words or "all" in words,
        maximum="max" in words or "all" in words,
        auto="auto" in words,
    )


def _existing(number: int, count: int) -> int:
    if not 0 <= number < count:
        has = f"heads 0 to {count - 1}" if count > 1 else "one head, 0"
        raise UserError(f"--heads {number}: this model has {has}")
    return number


def chosen_maps(maps_HRC: NDArray[Any], choice: HeadChoice) -> dict[str, FloatArray]:
    """The maps to show by name, each (rows, cols): `mean`, `max`, then `head0`, `head3`... as in `choice`.

    Weights stay as they are. In the mean and the maximum those that are not finite count as 0.
    """
    if choice.auto:
        raise ValueError("the heads that `auto` stands for are not picked yet; see `pick_heads`")
    maps_HRC = np.asarray(maps_HRC, np.float32)
    together = _finite(maps_HRC[list(choice.numbers)] if choice.numbers else maps_HRC)
    layers: dict[str, FloatArray] = {}
    if choice.mean:
        layers["mean"] = together.mean(axis=0)
    if choice.maximum:
        layers["max"] = together.max(axis=0)
    return layers | {f"head{number}": maps_HRC[number] for number in choice.numbers}


def label(name: str) -> str:
    """The name of a layer for people: `head0` is `head 0`."""
    if name == "pca":
        return "principal components"
    return re.sub(r"^head(\d+)$", r"head \1", name)


def head_number(name: str) -> int | None:
    """The head that a map of `chosen_maps` is of; None for the mean and the maximum."""
    match = re.fullmatch(r"head(\d+)", name)
    return int(match[1]) if match else None


def pick_heads_by(
    images: Iterable[ByteArray], attend: Callable[[ByteArray], NDArray[Any]], patch_size: int, most: int = 3
) -> tuple[tuple[int, ...], str]:
    """`pick_heads` from pictures (rows, cols, 3), 8 to 16 of them, and what gives maps (heads, rows, cols) of one.

    One picture is held at a time, if `images` are made one by one.
    """
    maps: list[NDArray[Any]] = []
    returned: list[NDArray[Any]] = []
    for image in images:
        whole, mirrored = mirror_pair(image, patch_size)
        maps.append(attend(whole))
        returned.append(attend(mirrored))
    return pick_heads(maps, returned, most)


def mirror_pair(image: ByteArray, patch_size: int) -> tuple[ByteArray, ByteArray]:
    """A picture (rows, cols, 3) for `pick_heads`, and the same mirrored left to right.

    Both are cut to whole patches, or the patches of the mirrored one would lie between those of the other.
    """
    rows, cols = (side - side % patch_size or side for side in image.shape[:2])
    whole = image[:rows, :cols]
    return np.ascontiguousarray(whole), np.ascontiguousarray(whole[:, ::-1])


def pick_heads(
    maps: Sequence[NDArray[Any]], mirrored: Sequence[NDArray[Any]], most: int = 3
) -> tuple[tuple[int, ...], str]:
    """Heads that find something in the pictures, chosen without labels, and a sentence that says how.

    A head is good when it looks at the same things after the picture is mirrored: its score is the Pearson
    correlation of its map with that of the mirrored picture, mirrored back, averaged over pictures. Two kinds of
    heads pass that test for nothing and are marked down: those that look at the same places whatever the picture
    shows (more than half of the correlation is left when the mirrored picture is another one; this takes two
    pictures), and those that look everywhere alike. The best head is taken, and those that come near it.

    Low entropy alone is no merit: the most focused heads are often stuck to a few patches that hold no object.

    Args:
        maps: of each picture (heads, rows, cols); 8 to 16 pictures are enough.
        mirrored: of each picture mirrored left to right, not mirrored back; see `mirror_pair`.
        most: pick this many heads at most.

    Returns:
        The heads, best first, and the sentence.
    """
    if not maps or len(maps) != len(mirrored) or most < 1:
        raise ValueError(f"{len(maps)} maps, {len(mirrored)} of mirrored pictures, at most {most} heads")
    score_H = _scores([_finite(m) for m in maps], [_finite(m)[..., ::-1] for m in mirrored])
    order = np.argsort(-score_H, kind="stable")[:most]
    picked = tuple(int(head) for head in order if score_H[head] >= _NEARLY_AS_GOOD * score_H[order[0]])
    listed = ", ".join(f"{head} ({score_H[head]:.2f})" for head in picked)
    others = [f"{head} ({value:.2f})" for head, value in enumerate(score_H) if head not in picked]
    pictures = (
        "1 picture and its mirror image"
        if len(maps) == 1
        else f"{len(maps)} pictures and their mirror images"
    )
    sentence = (
        f"heads picked without labels: {listed}, which on {pictures} look at the same things most alike "
        "(1.00 is best)"
    )
    if others:
        sentence += f"; not picked: {', '.join(others)}"
    if score_H[order[0]] < _LEAST_SCORE:
        sentence += "; none does so clearly: is this network trained?"
    return picked, sentence


def _scores(maps: list[FloatArray], returned: list[FloatArray]) -> NDArray[np.float64]:
    """(H,) in [0, 1], from maps and those of the mirrored pictures, mirrored back."""
    same_H = np.mean([_correlation(a, b) for a, b in zip(maps, returned, strict=True)], axis=0)
    others = [*returned[1:], returned[0]] if len(maps) > 1 else []
    other_H = np.zeros_like(same_H)
    if others:
        other_H = np.mean(
            [_correlation(a, _fit(b, a.shape)) for a, b in zip(maps, others, strict=True)], axis=0
        )
    focus_H = np.mean([_focus(each) for each in maps], axis=0)
    from_position_H = np.maximum(other_H, 0) / np.maximum(same_H, 1e-9)
    follows_content_H = np.clip(2 * (1 - from_position_H), 0, 1)
    return np.asarray(np.maximum(same_H, 0) * follows_content_H * np.minimum(focus_H / _LEAST_FOCUS, 1))


def _correlation(a_HRC: FloatArray, b_HRC: FloatArray) -> NDArray[np.float64]:
    """Pearson's, per head (H,); 0 where a map is constant."""
    a, b = (maps.reshape(len(maps), -1).astype(np.float64) for maps in (a_HRC, b_HRC))
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
    spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.asarray((a * b).sum(axis=1) / np.where(spread > 0, spread, np.inf))


def _focus(maps_HRC: FloatArray) -> NDArray[np.float64]:
    """1 - entropy / ln(patches), per head (H,): 0 is even, 1 a single patch; a map without mass is even."""
    weights = maps_HRC.reshape(len(maps_HRC), -1).astype(np.float64)
    if weights.shape[1] == 1:
        return np.ones(len(weights))
    mass = weights.sum(axis=1, keepdims=True)
    parts = np.where(mass > 0, weights / np.where(mass > 0, mass, 1), 1 / weights.shape[1])
    entropy = -(parts * np.log(np.where(parts > 0, parts, 1))).sum(axis=1)
    return np.asarray(1 - entropy / np.log(weights.shape[1]))


def _fit(maps_HRC: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The maps on another grid, by the nearest patch: pictures differ in size."""
    rows, cols = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(shape[1:], maps_HRC.shape[1:], strict=True)
    )
    return maps_HRC[:, rows[:, None], cols]


def _finite(maps: NDArray[Any]) -> FloatArray:
    return np.nan_to_num(np.asarray(maps, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
