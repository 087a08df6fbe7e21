"""`dino-attention` for pictures: decode, look, write, show on the page."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from dino.attention.drawing import Look, Picture
from dino.attention.gallery import Gallery
from dino.attention.inputs import Input, printable
from dino.attention.maps import resize
from dino.attention.picture_outputs import PictureOutputs
from dino.attention.render import ByteArray
from dino.attention.scale import FixedScale, PictureScale, Scale
from dino.attention.view import View
from dino.attention.visualize_options import VisualizeOptions
from dino.runtime.images import BrokenImageError, LargeJpegError, decode
from dino.runtime.options import UserError
from dino.runtime.remote import download, is_url

# Pictures that heads and colours are chosen by.
_SAMPLES = 8


class UnusablePictureError(UserError):
    """A picture that cannot be had or read: one of many is skipped."""


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
        return self.view.settle(islice(self._readable(pictures), _SAMPLES))

    def draw(self, what: Input) -> list[str]:
        """Names of the files in the input's folder.

        Raises:
            UnusablePictureError: it cannot be read.
            NoRoomError, OutsideError: as by `View`.
            UserError: a file cannot be written.
        """
        image = self._image(what)
        (maps_HRC,) = self.view.maps(image[None])
        weights = self.view.weights(maps_HRC)
        picture = Picture(image, weights, self._scale()(weights), self.view.features(image))
        outputs = PictureOutputs(self.look, self._styles(), self.options.npz)
        names = outputs.write(what.folder, f"{what.title} · {self.title}", picture, maps_HRC)
        if self.gallery is not None:
            self.gallery.add_picture(
                what.name,
                image,
                maps_HRC,
                self.look.patch_size,
                what.folder,
                names,
                on=self.view.single_heads,
            )
        return names

    def _readable(self, pictures: Sequence[Input]) -> Iterator[ByteArray]:
        """The pictures that can be read, in an order whose beginning is spread over all."""
        step = max(1, -(-len(pictures) // _SAMPLES))
        for each in chain.from_iterable(pictures[start::step] for start in range(step)):
            try:
                image = self._image(each)
            except UnusablePictureError:
                continue  # named when its turn comes
            yield image

    def _image(self, what: Input) -> ByteArray:
        if not is_url(what.place):
            return self._read(Path(what.place), what)
        with tempfile.TemporaryDirectory() as folder:
            try:
                file = download(what.place, Path(folder))
            except UserError as error:
                raise UnusablePictureError(str(error)) from error
            return self._read(file, what)

    def _read(self, file: Path, what: Input) -> ByteArray:
        match self.image_size:
            case (rows, cols):
                at_least: int | None = max(rows, cols)
            case short_side:
                at_least = short_side
        name = printable(what.place)
        try:
            return resize(decode(file, name, at_least=at_least), self.image_size)
        except LargeJpegError as error:
            raise UnusablePictureError(
                f"{error}; a JPEG is shrunk while it is read if --image_size is small enough, such as 1000"
            ) from error
        except BrokenImageError as error:
            raise UnusablePictureError(str(error)) from error
        except UserError as error:
            raise UnusablePictureError(f"{name}: {error}") from error

    def _styles(self) -> tuple[str, ...]:
        styles = self.options.draw or ("heat",)
        return (*styles, "mask") if self.options.threshold is not None and "mask" not in styles else styles

    def _scale(self) -> Scale:
        if self.options.fixed_scale is not None:
            return FixedScale(self.options.fixed_scale)
        return PictureScale(self.options.shown)
