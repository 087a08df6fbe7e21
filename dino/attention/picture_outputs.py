"""The files of one picture: what the network saw, its heads in every style, a sheet of them, the raw arrays."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino.attention.drawing import Look, Picture
from dino.attention.heads import head_number, label
from dino.attention.marks import HeadColors
from dino.attention.render import FloatArray, save_png
from dino.attention.sheet import Panel, panel_sheet
from dino.runtime.files import make_writable, write_atomically


@dataclass(frozen=True)
class PictureOutputs:
    """Writes a picture's files.

    Args:
        styles: see `drawing.STYLES`.
        npz: also write the raw arrays.
    """

    look: Look
    styles: tuple[str, ...]
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
        save_png(panel_sheet(self._panels(picture), title=title), folder / "sheet.png")
        names = ["img.png", "sheet.png", *self.look.save(folder, self.styles, picture)]
        if self.npz:
            self._write_arrays(folder / "maps.npz", picture, maps_HRC)
            names.append("maps.npz")
        return names

    def _panels(self, picture: Picture) -> Iterator[Panel]:
        """Heat of everything as in the files; with the colours of heads also these, and which head has which."""
        in_colors = "colors" in self.styles
        patches = not self.look.smooth
        yield Panel(picture.image, "picture")
        if in_colors:
            yield Panel(self.look.panel("colors", "", picture), "heads in colours", patches=True)
        for name in (*picture.weights, *picture.features):
            head = head_number(name)
            color = HeadColors().color(head) if in_colors and head is not None else None
            yield Panel(self.look.panel("heat", name, picture), label(name), color, patches)

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
