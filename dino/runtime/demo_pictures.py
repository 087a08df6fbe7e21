"""The data set `demo`: textured shapes on defocused photographs, made by the package itself.

A class is a shape and a texture family together. Colours, position, size, orientation and background are
random, so the class is in neither the colours nor the raw pixels. The backgrounds are crops of the two
photographs that scikit-learn ships. Every picture comes with the mask of its object, which tells whether an
attention map finds it.
"""

import colorsys
from collections.abc import Callable
from functools import cache
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from dino.runtime.pictures import Pictures

Array = npt.NDArray[np.float32]
Outline = npt.NDArray[np.float64]
Height = npt.NDArray[np.floating]

# Edges are drawn this much larger and averaged down: OpenCV's own antialiasing does not reach filled holes.
_OVERSAMPLING = 4

# Length of the object's longer side over the picture's, and pattern period over the picture's side.
_OBJECT_SIZE = (0.45, 0.75)
_PERIOD = (0.075, 0.115)


class DemoPictures(Pictures):
    """`count` pictures of `side` x `side`, equally many of every class; each depends on its index alone.

    Args:
        split: "train" and "val" share no picture.
        count: number of pictures; by default 2000 for training and 500 for validation.
        side: rows and columns in pixels.
        seed: another number gives other pictures.
    """

    def __init__(
        self,
        split: Literal["train", "val"] = "train",
        *,
        count: int | None = None,
        side: int = 96,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', got '{split}'")
        if count is None:
            count = {"train": 2000, "val": 500}[split]
        if count < 1 or side < 16 or seed < 0:
            raise ValueError(
                f"count must be at least 1, side at least 16, seed at least 0; got {count}, {side}, {seed}"
            )
        self.split = split
        self.side = side
        self.seed = seed
        self.classes = [f"{shape}-{texture}" for shape, texture in zip(_SHAPES, _TEXTURES, strict=True)]
        self.labels = [index % len(self.classes) for index in range(count)]

    def __len__(self) -> int:
        return len(self.labels or ())

    def name(self, index: int) -> str:
        return f"demo/{self.split}/{self._label(index)}/{index:05d}"

    def picture(self, index: int, *, at_least: int | None = None) -> PIL.Image.Image:
        background, painted, coverage = self.layers(index)
        blend = background + (painted - background) * coverage[..., None]
        return PIL.Image.fromarray(np.rint(blend * 255).clip(0, 255).astype(np.uint8))

    def layers(self, index: int) -> tuple[Array, Array, Array]:
        """What a picture is made of, all in [0, 1]: the background and the object's texture, (side, side, 3), and
        how much of each pixel the object covers, (side, side)."""
        coverage, random = self._object(index)
        background = _background(self.side, random)
        pattern = _pattern(self._label(index).split("-")[1], coverage, random)
        dark, light = _two_colours(random)
        return background, dark + (light - dark) * pattern[..., None], coverage

    def mask(self, index: int) -> npt.NDArray[np.bool_]:
        """Where the object is: (side, side), True on it."""
        return self._object(index)[0] > 0.5

    def _label(self, index: int) -> str:
        return self.classes[index % len(self.classes)]

    def _object(self, index: int) -> tuple[Array, np.random.Generator]:
        """Coverage of each pixel by the object, (side, side) in [0, 1], and the generator for the rest."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0..{len(self) - 1}, got {index}")
        random = np.random.default_rng([self.seed, ("train", "val").index(self.split), index])
        return _coverage(self._label(index).split("-")[0], self.side, random), random


def _coverage(shape: str, side: int, random: np.random.Generator) -> Array:
    """The shape turned a little, resized, and put anywhere inside the picture."""
    angle = np.deg2rad(random.uniform(-25, 25))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outlines = [outline @ turn.T for outline in _SHAPES[shape]()]
    low = np.min([outline.min(0) for outline in outlines], axis=0)
    high = np.max([outline.max(0) for outline in outlines], axis=0)
    scale = side * random.uniform(*_OBJECT_SIZE) / (high - low).max()
    # Near a border more often than not: where objects are central, a centred disc passes for attention.
    corner = 1 + random.beta(0.5, 0.5, size=2) * (side - 2 - scale * (high - low))
    fixed_point_bits = 8
    points = [
        np.rint((scale * (outline - low) + corner) * _OVERSAMPLING * 2**fixed_point_bits).astype(np.int32)
        for outline in outlines
    ]
    canvas = np.zeros((side * _OVERSAMPLING, side * _OVERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, points, 255, shift=fixed_point_bits)
    coverage = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
    return coverage.astype(np.float32) / 255


# Shapes: closed outlines (x, y) of any size, y downwards; a second outline is a hole.


def _around(radii: npt.ArrayLike, first: float = -90) -> Outline:
    """Points at equal angles around the origin, the first at `first` degrees."""
    radii = np.asarray(radii, float)
    angles = np.deg2rad(first + 360 * np.arange(len(radii)) / len(radii))
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _disc() -> list[Outline]:
    return [_around(np.ones(72))]


def _square() -> list[Outline]:
    return [_around(np.ones(4), first=-45)]


def _triangle() -> list[Outline]:
    return [_around(np.ones(3))]


def _star() -> list[Outline]:
    return [_around(np.tile([1, 0.45], 5))]


def _ring() -> list[Outline]:
    return [_around(np.ones(72)), _around(np.full(72, 0.45))]


def _cross() -> list[Outline]:
    arm = 0.36
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn, n) for n in range(4)])]


def _hexagon() -> list[Outline]:
    return [_around(np.ones(6))]


def _crescent() -> list[Outline]:
    """A disc less a smaller disc that is shifted to the right."""
    shift, radius = 0.5, 0.78
    x = (1 - radius**2 + shift**2) / (2 * shift)
    outer_horn, inner_horn = np.arccos(x), np.arccos((x - shift) / radius)
    outer = np.linspace(outer_horn, 2 * np.pi - outer_horn, 60)
    inner = np.linspace(2 * np.pi - inner_horn, inner_horn, 60)[1:-1]
    far = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    near = np.stack([shift + radius * np.cos(inner), radius * np.sin(inner)], axis=1)
    return [np.concatenate([far, near])]


def _heart() -> list[Outline]:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([16 * np.sin(t) ** 3, -y], axis=1)]


def _arrow() -> list[Outline]:
    half = np.array([[0, -1], [0.85, -0.05], [0.36, -0.05], [0.36, 1]])
    return [np.concatenate([half, half[::-1] * [-1, 1]])]


_SHAPES: dict[str, Callable[[], list[Outline]]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "hexagon": _hexagon,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
}


# Textures: (u, v) in periods, (rows, cols) each, to a signed height whose zero line separates two colours.


def _stripes(u: Array, v: Array, random: np.random.Generator) -> Height:
    return np.sin(2 * np.pi * u)


def _checks(u: Array, v: Array, random: np.random.Generator) -> Height:
    return 1.5 * np.sin(np.pi * u) * np.sin(np.pi * v)


def _dots(u: Array, v: Array, random: np.random.Generator) -> Height:
    return 4 * (0.34 - np.hypot(u - np.rint(u), v - np.rint(v)))


def _rings(u: Array, v: Array, random: np.random.Generator) -> Height:
    return np.sin(2 * np.pi * np.hypot(u, v))


def _rays(u: Array, v: Array, random: np.random.Generator) -> Height:
    return 1.5 * np.sin(8 * np.arctan2(v, u))


def _grid(u: Array, v: Array, random: np.random.Generator) -> Height:
    return 4 * (0.16 - np.minimum(abs(u - np.rint(u)), abs(v - np.rint(v))))


def _bricks(u: Array, v: Array, random: np.random.Generator) -> Height:
    row = np.floor(v)
    along = u / 2 + row / 2
    joint = np.minimum(2 * abs(along - np.rint(along)), abs(v - np.rint(v)))
    return 4 * (joint - 0.13)


def _zigzag(u: Array, v: Array, random: np.random.Generator) -> Height:
    triangle_wave = 2 * abs(v / 2 - np.rint(v / 2))
    return np.sin(2 * np.pi * (u + triangle_wave))


def _blobs(u: Array, v: Array, random: np.random.Generator) -> Height:
    period = 1 / np.hypot(u[0, 1] - u[0, 0], v[0, 1] - v[0, 0])
    noise = random.standard_normal(u.shape, np.float32)
    height = cv2.GaussianBlur(noise, (0, 0), 0.3 * period)
    return 1.5 * height / height.std()


def _scales(u: Array, v: Array, random: np.random.Generator) -> Height:
    """Overlapping arcs, each row half a scale further."""
    height = np.full_like(u, -1)
    for row in (0, 1, 2):
        y = np.floor(v) - row
        x = u + y / 2
        inside = np.hypot(x - np.rint(x), (v - y - 1) * 0.5)
        height = np.where((inside < 0.62) & (v - y >= 0), inside, height)
    return 6 * (0.16 - abs(height - 0.5))


_TEXTURES: dict[str, Callable[[Array, Array, np.random.Generator], Height]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "rays": _rays,
    "grid": _grid,
    "bricks": _bricks,
    "zigzag": _zigzag,
    "blobs": _blobs,
    "scales": _scales,
}


def _pattern(texture: str, coverage: Array, random: np.random.Generator) -> Array:
    """The texture at a random scale and orientation around the object's middle: (side, side) in [0, 1]."""
    side = len(coverage)
    centre = [np.average(np.arange(side), weights=coverage.sum(axis)) for axis in (1, 0)]
    period = side * random.uniform(*_PERIOD)
    angle = random.uniform(0, 2 * np.pi)
    y = (np.arange(side, dtype=np.float32)[:, None] - np.float32(centre[0])) / np.float32(period)
    x = (np.arange(side, dtype=np.float32)[None] - np.float32(centre[1])) / np.float32(period)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    height = _TEXTURES[texture](cos * x + sin * y, cos * y - sin * x, random)
    return np.asarray((0.5 + height).clip(0, 1), np.float32)


def _two_colours(random: np.random.Generator) -> tuple[Array, Array]:
    """A dark and a light colour of independent random hues."""
    dark = colorsys.hsv_to_rgb(random.uniform(), random.uniform(0.3, 0.9), random.uniform(0.1, 0.45))
    light = colorsys.hsv_to_rgb(random.uniform(), random.uniform(0.1, 0.6), random.uniform(0.75, 1))
    return np.array(dark, np.float32), np.array(light, np.float32)


@cache
def _photographs() -> list[npt.NDArray[np.uint8]]:
    from sklearn.datasets import load_sample_images  # takes a second, and these are not all demo pictures

    return [np.asarray(photograph) for photograph in load_sample_images().images]


def _background(side: int, random: np.random.Generator) -> Array:
    """A random square of a photograph, out of focus, greyish and flat: (side, side, 3) in [0, 1]."""
    photographs = _photographs()
    photograph = photographs[random.integers(len(photographs))]
    rows, cols = photograph.shape[:2]
    size = int(random.uniform(0.3, 1) * min(rows, cols))
    top, left = random.integers(rows - size + 1), random.integers(cols - size + 1)
    square = photograph[top : top + size, left : left + size].astype(np.float32) / 255
    crop = cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA)
    crop = cv2.GaussianBlur(crop, (0, 0), 0.05 * side, borderType=cv2.BORDER_REFLECT)
    if random.uniform() < 0.5:
        crop = crop[:, ::-1]
    saturation, contrast = 0.3, 0.25
    grey = crop.mean(axis=2, keepdims=True)
    crop = grey + saturation * (crop - grey)
    return crop.mean() + contrast * (crop - crop.mean())
