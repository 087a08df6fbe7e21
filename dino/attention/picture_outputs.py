"""The files of one picture: what the network saw, its heads in every style, a sheet of them, the raw arrays."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino.attention.drawing import Look, Picture
from dino.attention.heads import label
from dino.attention.render import FloatArray, save_png
from dino.attention.scale import Percentiles
from dino.attention.sheet import AttentionSheet
from dino.runtime.files import make_writable, write_atomically


@dataclass(frozen=True)
class PictureOutputs:
    """Writes a picture's files.

    Args:
        styles: see `drawing.STYLES`.
        percentiles: of the sheet's colours.
        npz: also write the raw arrays.
    """

    look: Look
    styles: tuple[str, ...]
    percentiles: Percentiles
    npz: bool

    def write(self, folder: Path, title: str, picture: Picture, maps_HRC: FloatArray) -> list[str]:
        """Names of the files in `folder`.

        Args:
            title: of the sheet.
            maps_HRC: every head's raw weights, whatever is drawn.

        Raises:
            UserError: one cannot be written.
        """
        make_writable(folder, "--output_dir")
        save_png(picture.image, folder / "img.png")
        save_png(self._sheet(title, picture), folder / "sheet.png")
        names = ["img.png", "sheet.png", *self.look.save(folder, self.styles, picture)]
        if self.npz:
            self._write_arrays(folder / "maps.npz", picture, maps_HRC)
            names.append("maps.npz")
        return names

    def _sheet(self, title: str, picture: Picture) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        draw = AttentionSheet(
            self.look.colormap, percentiles=self.percentiles, smooth=self.look.smooth, tile=288, columns=5
        )
        names = list(picture.weights)
        return draw(
            [picture.image],
            [np.stack([picture.weights[name] for name in names])],
            patch_size=self.look.patch_size,
            title=title,
            labels=[label(name) for name in names],
        )

    def _write_arrays(self, path: Path, picture: Picture, maps_HRC: FloatArray) -> None:
        buffer = io.BytesIO()
        arrays = {
            "attention": maps_HRC,
            "patch_size": np.array(self.look.patch_size),
            "image_size": np.array(picture.image.shape[:2]),
            **picture.features,
        }
        np.savez_compressed(buffer, **arrays)
        write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
