"""Layers of a clip's frames on disk, from the pass that looks at them to the pass that draws them."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import numpy as np

from dino.attention.render import FloatArray
from dino.runtime.options import UserError


class LayerStore:
    """Layers of frames in a temporary file, read back in the order that they came in; to be used with `with`.

    The file has no name, so that nothing is left of it whatever happens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> "LayerStore":
        with self._keeping():
            self._file = tempfile.TemporaryFile(dir=self._folder)
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # on a full disk it tries once more to write what nobody needs
            self._file.close()

    def append(self, time: Fraction, layers: Mapping[str, FloatArray]) -> None:
        """Add a frame's layers, of the same names and shapes each time.

        Raises:
            UserError: the disk is full.
        """
        self._shapes = self._shapes or {name: layer.shape for name, layer in layers.items()}
        with self._keeping():
            self._file.write(np.float64(time).tobytes())
            for layer in layers.values():
                self._file.write(np.ascontiguousarray(layer, np.float32).tobytes())

    def __iter__(self) -> Iterator[tuple[float, dict[str, FloatArray]]]:
        """(seconds, layers) of each frame."""
        with self._keeping():
            self._file.seek(0)
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        while block := self._file.read(8 + 4 * sum(sizes)):
            (seconds,) = np.frombuffer(block, np.float64, 1)
            parts = np.split(np.frombuffer(block, np.float32, offset=8), np.cumsum(sizes)[:-1])
            named = zip(self._shapes.items(), parts, strict=True)
            yield float(seconds), {name: part.reshape(shape) for (name, shape), part in named}

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot keep the maps of all frames in {self._folder}: {error.strerror or error}; make room, or draw "
                "in one pass with --normalize running"
            ) from error
