"""`dino-attention` for pictures: decode, look, write, show on the page."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino.attention.drawing import Look, Picture
from dino.attention.gallery import Gallery
from dino.attention.inputs import Input
from dino.attention.maps import resize
from dino.attention.picture_outputs import PictureOutputs
from dino.attention.render import ByteArray
from dino.attention.scale import FixedScale, PictureScale, Scale
from dino.attention.view import View
from dino.attention.visualize_options import VisualizeOptions
from dino.runtime.images import BrokenImageError, decode
from dino.runtime.remote import download, is_url

# Pictures that heads and colours are chosen by.
_SAMPLES = 8


@dataclass(frozen=True)
class PictureDrawing:
    """Draws one picture after the other.

    Args:
        image_size: what pictures are resized to; None: as they are.
        title: of a picture's sheet, behind its name.
        gallery: None: no page.
    """

    view: View
    look: Look
    options: VisualizeOptions
    image_size: int | tuple[int, int] | None
    title: str
    gallery: Gallery | None

    def settle(self, pictures: Sequence[Input]) -> list[str]:
        """Choose heads and colours by some of the pictures; sentences that say how."""
        samples: list[ByteArray] = []
        for each in pictures[:: max(1, len(pictures) // _SAMPLES)][:_SAMPLES]:
            try:
                samples.append(self._image(each))
            except BrokenImageError:
                continue  # named when its turn comes
        return self.view.settle(samples) if samples else []

    def draw(self, what: Input) -> list[str]:
        """Names of the files in the input's folder.

        Raises:
            BrokenImageError: it cannot be read.
            UserError: a file cannot be written.
        """
        image = self._image(what)
        (maps_HRC,) = self.view.maps(image[None])
        weights = self.view.weights(maps_HRC)
        picture = Picture(image, weights, self._scale()(weights), self.view.features(image))
        outputs = PictureOutputs(self.look, self._styles(), self.options.shown, self.options.npz)
        title = f"{Path(what.name).name} · {self.title}"
        names = outputs.write(what.folder, title, picture, maps_HRC)
        if self.gallery is not None:
            self.gallery.add_picture(what.name, image, maps_HRC, self.look.patch_size, what.folder)
        return names

    def _image(self, what: Input) -> ByteArray:
        at_least = None
        if self.image_size is not None:
            at_least = self.image_size if isinstance(self.image_size, int) else max(self.image_size)
        if not is_url(what.place):
            return resize(decode(Path(what.place), what.place, at_least=at_least), self.image_size)
        with tempfile.TemporaryDirectory() as folder:
            file = download(what.place, Path(folder))
            return resize(decode(file, what.place, at_least=at_least), self.image_size)

    def _styles(self) -> tuple[str, ...]:
        styles = self.options.draw or ("heat",)
        return (*styles, "mask") if self.options.threshold is not None and "mask" not in styles else styles

    def _scale(self) -> Scale:
        if self.options.scale:
            return FixedScale((self.options.scale[0], self.options.scale[1]))
        return PictureScale(self.options.shown)
