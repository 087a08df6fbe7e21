"""One picture from one file: upright, RGB, 8 bits, whatever it was stored as; or one plain reason why not."""

import contextlib
import io
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

# A file of a few kilobytes can stand for billions of pixels. Each that is decoded takes up to 17 bytes until it
# is RGB (24 in a WebP with alpha), so this is a matter of 2 to 3 GB.
MAX_PIXELS = 128_000_000

# A JPEG that is to be shrunk is opened, and may come below the limit of what is decoded.
_MAX_PIXELS_OPENED = 4 * MAX_PIXELS

# Formats that Pillow registers but cannot decode by itself; for EPS it runs Ghostscript on the file.
_NOT_DECODED = frozenset({"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"})

# An opened file of these holds a decoder, twice as large as the picture, for as long as it lives; a copy does not.
_KEEP_THEIR_DECODER = ("WEBP", "AVIF")

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Of the red, green and blue of ImageNet's pictures, in [0, 1]; timm and torchvision, which have them too, take
# seconds to import.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BrokenImageError(Exception):
    """A picture that cannot be read: `name` of the picture and `reason`, a few plain words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # all arguments, or it could not be pickled on its way out of a worker
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class LargeJpegError(BrokenImageError):
    """A JPEG of too many pixels, which could be decoded at a part of its size: see `decode`, `at_least`."""


def decode(
    file: Path | BinaryIO, name: str, *, at_least: int | None = None, as_stored: bool = False
) -> Image.Image:
    """The first picture in the file, upright and RGB.

    EXIF and XMP orientation is applied. CMYK and Lab go through their colour profile; RGB profiles are not
    applied, as in torchvision, since published networks were trained on the stored values. Transparent parts
    become white. Wide greys (16 bits, integers, floats) are scaled to 8 bits.

    Args:
        file: a path, or a binary stream that can seek.
        name: what to call the picture in errors.
        at_least: length in pixels of the short side that is enough. A JPEG that is far larger is decoded at
            1/2, 1/4 or 1/8 of its size, never below twice this length; None always decodes it whole.
        as_stored: none of the above but Pillow's plain conversion to RGB, which is what torchvision's ImageFolder
            does and published accuracies were measured with.

    Raises:
        BrokenImageError: anything that keeps the picture from being read.
        LargeJpegError: it has too many pixels, and fewer of them could be read.
    """
    with reading(name):
        if isinstance(file, Path):
            with _open_file(file) as stream:
                return _decode_stream(stream, at_least, as_stored)
        return _decode_stream(file, at_least, as_stored)


def rgb(image: Image.Image) -> Image.Image:
    """The loaded image upright, in mode RGB."""
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey_8_bit(image)
    elif image.mode in ("CMYK", "LAB"):
        image = _from_profile(image)
    elif image.has_transparency_data:
        # White, as on a page: drawings without a background are mostly dark and would vanish on black.
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    if image.mode == "RGB" and image.format not in _KEEP_THEIR_DECODER:
        return image
    return image.convert("RGB")


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Run Pillow without its warnings, and turn whatever it raises into a BrokenImageError."""
    try:
        with _quiet_pillow():
            yield
    except BrokenImageError as error:
        raise type(error)(name, error.reason) from None
    except Exception as error:  # on damaged bytes decoders raise nearly anything
        raise BrokenImageError(name, _reason(error)) from error


@cache
def suffixes() -> frozenset[str]:
    """Lower-case suffixes, with the dot, of the files that are taken for pictures."""
    readable = _formats()
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in readable}
    return frozenset(known | {".mpo"})  # read by the JPEG plugin, registered for writing only


def is_picture_name(name: str) -> bool:
    """Whether the suffix, in upper or lower case, is one that is read."""
    return name[name.rfind(".") :].lower() in suffixes()


@cache
def _formats() -> tuple[str, ...]:
    Image.preinit()  # the common formats first: the order here is the order in which they are tried
    Image.init()
    return tuple(form for form in Image.ID if form not in _NOT_DECODED)


def _open_file(file: Path) -> BinaryIO:
    mode = file.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe waits until somebody writes into it
        raise BrokenImageError("", "a pipe or a device, not a file")
    return file.open("rb")


def _decode_stream(stream: BinaryIO, at_least: int | None, as_stored: bool) -> Image.Image:
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        raise BrokenImageError("", "empty file")
    try:
        with Image.open(stream, formats=_formats()) as image:
            if at_least is not None:
                image.draft(None, (2 * at_least, 2 * at_least))
            if image.width * image.height > MAX_PIXELS:
                refused = LargeJpegError if image.format in ("JPEG", "MPO") else BrokenImageError
                raise refused("", _too_large(image.width * image.height))
            image.load()
            return image.convert("RGB") if as_stored else rgb(image)
    except (OSError, SyntaxError, EOFError, struct.error) as error:
        if isinstance(error, EOFError) or "truncated" in str(error).lower():
            raise BrokenImageError("", f"truncated after {size:,} bytes") from error
        raise


def _upright(image: Image.Image) -> Image.Image:
    """`ImageOps.exif_transpose`, which also writes the EXIF anew and so fails where that is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # no readable orientation is none: the pixels are whole
        return image
    method = _TO_UPRIGHT.get(cast(int, orientation))
    if method is None:
        return image
    turned = image.transpose(method)
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        turned.info.pop(key, None)  # or whoever looks next would turn it again
    return turned


def _grey_8_bit(image: Image.Image) -> Image.Image:
    """Wide grey to L. Pillow's own conversion clips: everything above 255 becomes white.

    16 bits are scaled by their range, to which Pillow has scaled the integers of a PGM. Other integers and
    floats have none that is certain: it is taken to end at the first of 1 (floats), 255 and 65535 that holds
    all values, else at the largest value.
    """
    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        top = 65535.0
    else:
        values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
        largest = float(values.max())
        ends = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        top = next((end for end in ends if largest <= end), largest)
    grey = values.astype(np.float32)
    grey *= 255 / top
    return Image.fromarray(grey.round(out=grey).clip(0, 255, out=grey).astype(np.uint8))


def _from_profile(image: Image.Image) -> Image.Image:
    """CMYK by its embedded profile, else by Pillow's plain formula; Lab by its definition."""
    embedded = image.info.get("icc_profile")
    if image.mode == "CMYK" and not embedded:
        return image
    try:
        profile = (
            ImageCms.createProfile("LAB")
            if image.mode == "LAB"
            else ImageCms.ImageCmsProfile(io.BytesIO(cast(bytes, embedded)))
        )
        srgb = ImageCms.createProfile("sRGB")
        return cast(Image.Image, ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError):  # a profile that is damaged or not for this mode
        return image


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        pixels = int(cast(re.Match[str], re.search(r"\d+", str(error)))[0])
        return _too_large(pixels)
    if isinstance(error, UnidentifiedImageError):
        return "not a picture that Pillow can read"
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"damaged: {error or type(error).__name__}"


def _too_large(pixels: int) -> str:
    return f"{pixels / 1e6:.0f} Mpx, the limit is {MAX_PIXELS / 1e6:.0f} Mpx"


class _QuietPillow:
    """Pillow without its warnings, and with our limit of pixels.

    Both belong to the whole process. The first thread to enter changes them and the last to leave restores
    them, so threads decode at the same time and none restores what another still needs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                self._restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = _MAX_PIXELS_OPENED // 2  # Pillow refuses what is over twice this
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore.close()


_quiet = _QuietPillow()


def _quiet_pillow() -> contextlib.AbstractContextManager[None]:
    return _quiet
