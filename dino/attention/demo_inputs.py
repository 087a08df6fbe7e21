"""What `--input demo` is: some of the embedded pictures, and a clip in which their objects move."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from dino.attention.render import ByteArray, save_png
from dino.runtime.files import make_writable
from dino.video.writer import VideoWriter

if TYPE_CHECKING:
    from dino.runtime.demo_pictures import DemoPictures

_PICTURES = (0, 3, 5, 9)
_SIDE = 288

_ACTORS = (8, 13)
_SIZE = (240, 352)
_RATE = Fraction(25, 2)
_FRAMES = 60


def write_demo_inputs(folder: Path) -> None:
    """Pictures and `clip.mp4`, of 4.8 seconds, into the folder.

    Raises:
        UserError: it cannot be written.
    """
    from dino.runtime.demo_pictures import DemoPictures  # takes seconds, which --help has not

    make_writable(folder, "--output_dir")
    pictures = DemoPictures("val", side=_SIDE)
    for index in _PICTURES:
        name = pictures.name(index).split("/")[-2]
        save_png(np.asarray(pictures.picture(index)), folder / f"{name}.png")
    with VideoWriter(folder / "clip.mp4", _SIZE, _RATE) as writer:
        for number, frame in enumerate(_clip_frames(DemoPictures("val", side=_SIZE[0]))):
            writer.write(frame, Fraction(number) / _RATE, 1 / _RATE)


def _clip_frames(pictures: "DemoPictures") -> Iterator[ByteArray]:
    """Two objects that cross, one of them turning, before a background that pans."""
    actors = [pictures.layers(index)[1:] for index in _ACTORS]
    background = cv2.resize(pictures.layers(_ACTORS[0])[0], (2 * _SIZE[1], 2 * _SIZE[0]))
    for number in range(_FRAMES):
        phase = number / (_FRAMES - 1)
        left = round(phase * (background.shape[1] - _SIZE[1]))
        frame = background[: _SIZE[0], left : left + _SIZE[1]].copy()
        for actor, (painted, coverage) in enumerate(actors):
            frame = _placed(frame, painted, coverage, _move(actor, phase, coverage))
        yield np.rint(frame * 255).clip(0, 255).astype(np.uint8)


def _move(actor: int, phase: float, coverage: NDArray[np.float32]) -> NDArray[np.float64]:
    """The affine map, 2 x 3, that takes an object from its picture to its place in the frame."""
    rows, cols = np.nonzero(coverage > 0.5)
    angle = 360 * phase if actor else 12 * np.sin(6 * np.pi * phase)
    scale = 0.62 + 0.18 * np.sin(2 * np.pi * phase + 2 * actor)
    move = cv2.getRotationMatrix2D((float(cols.mean()), float(rows.mean())), angle, scale)
    along = 0.15 + 0.7 * (phase if actor else 1 - phase)
    height = 0.5 + (0.22 if actor else -0.18) * np.cos(2 * np.pi * phase)
    move[:, 2] += (along * _SIZE[1] - cols.mean(), height * _SIZE[0] - rows.mean())
    return np.asarray(move, np.float64)


def _placed(
    frame: NDArray[np.float32],
    painted: NDArray[np.float32],
    coverage: NDArray[np.float32],
    move: NDArray[np.float64],
) -> NDArray[np.float32]:
    size = (_SIZE[1], _SIZE[0])
    alpha = cv2.warpAffine(coverage, move, size)[..., None]
    return np.asarray(frame + alpha * (cv2.warpAffine(painted, move, size) - frame), np.float32)
