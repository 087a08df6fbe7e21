"""Pictures and the masks of the objects in them: PNG files as in Pascal VOC, or annotations as in COCO.

for picture in open_masks(Path("JPEGImages"), Path("SegmentationObject")).pictures:
    objects = picture.read()                # objects.masks: {"1": (rows, cols) bool, ...}
"""

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino.runtime.images import BrokenImageError, is_picture_name, reading
from dino.runtime.options import UserError
from dino.runtime.picture_files import files_in

BoolArray = NDArray[np.bool_]

VOID = 255

# Without loss only: elsewhere the edges of objects hold numbers of objects that do not exist.
_MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Objects:
    """What a picture shows: masks (rows, cols) by the object's name, and the pixels that nobody has judged."""

    masks: dict[str, BoolArray]
    void: BoolArray

    def union(self) -> "Objects":
        """All objects as one."""
        return Objects({"all": np.any(list(self.masks.values()), axis=0)} if self.masks else {}, self.void)


@dataclass(frozen=True)
class MaskedPicture:
    """A picture's name and file, and `read`, which raises BrokenImageError where the masks cannot be read."""

    name: str
    path: Path
    read: Callable[[], Objects]


@dataclass(frozen=True)
class MaskedPictures:
    """Pictures with masks, in the order of their names, and sentences on what was left out."""

    pictures: list[MaskedPicture]
    left_out: list[str]


def open_masks(images: Path, masks: Path, *, void: int = VOID) -> MaskedPictures:
    """The pictures of a folder that have masks. The masks are read later, one picture at a time.

    Args:
        images: folder, searched through.
        masks: either a folder with a file for each picture, of the same path but for the suffix, in palette or
            grey: a pixel is the number of its object or class, and 0 the background. Or a COCO file (`.json`):
            its crowds are no objects, and nobody has judged their pixels.
        void: number of the pixels that nobody has judged; -1: there is none. A mask of 0 and 255 alone is taken
            for a plain one, white on black, and 255 for its object.

    Raises:
        UserError: no folder or file of that name, no such JSON, or no picture has a mask.
    """
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    if masks.suffix.lower() == ".json":
        found = _coco(images, masks)
    elif masks.is_dir():
        found = _files(images, masks, void)
    else:
        raise UserError(f"--masks {masks}: neither a folder of mask files nor a COCO file that ends in .json")
    if not found.pictures:
        reason = found.left_out[0] if found.left_out else "there are none"
        raise UserError(f"no picture of --images {images} has a mask in --masks {masks}: {reason}")
    return found


def check_same_shape(mask: tuple[int, int], picture: tuple[int, int], name: str) -> None:
    """Refuse a mask (rows, cols) that is not the picture's but for its resolution, up to a pixel.

    Raises:
        BrokenImageError: it is turned or cut otherwise.
    """
    rows, cols = picture[0] * mask[1] / picture[1], picture[1] * mask[0] / picture[0]
    if abs(mask[0] - rows) > 1 and abs(mask[1] - cols) > 1:
        raise BrokenImageError(
            name, f"the mask is {mask[1]} x {mask[0]} pixels, the upright picture {picture[1]} x {picture[0]}"
        )


def _files(images: Path, masks: Path, void: int) -> MaskedPictures:
    if images.resolve() == masks.resolve():
        raise UserError("--images and --masks are the same folder: which files are masks?")
    of_picture = _by_path(masks, lambda name: name.lower().endswith(_MASK_SUFFIXES))
    pictures = [Path(name) for name in _list(images) if is_picture_name(name)]
    with_mask = [name for name in pictures if name.with_suffix("") in of_picture]
    used = {name.with_suffix("") for name in with_mask}
    left_out = _missing("pictures have no mask", [name for name in pictures if name not in set(with_mask)])
    left_out += _missing(
        "masks have no picture", [mask for key, mask in of_picture.items() if key not in used]
    )
    found = [
        MaskedPicture(
            name.as_posix(),
            images / name,
            partial(_read_mask, masks / of_picture[name.with_suffix("")], void),
        )
        for name in with_mask
    ]
    return MaskedPictures(found, left_out)


def _by_path(folder: Path, wanted: Callable[[str], bool]) -> dict[PurePath, Path]:
    return {Path(name).with_suffix(""): Path(name) for name in _list(folder) if wanted(name)}


def _list(folder: Path) -> Iterable[str]:
    try:
        return sorted(files_in(folder))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from error


def _missing(what: str, names: list[Path]) -> list[str]:
    """A sentence, or none where nothing is missing."""
    listed = ", ".join(name.as_posix() for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"{len(names)} {what} ({listed})"] if names else []


def _read_mask(path: Path, void: int) -> Objects:
    """Pillow keeps the numbers of a palette, which OpenCV turns into colours."""
    with reading(str(path)), Image.open(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise BrokenImageError(
                "", f"a mask holds numbers, in palette or grey, and this one {image.mode} colours"
            )
        numbers = np.asarray(image).astype(np.int64)
    present = [int(number) for number in np.unique(numbers) if number]
    if present == [VOID]:
        return Objects({str(VOID): numbers == VOID}, np.zeros(numbers.shape, bool))
    masks = {str(number): numbers == number for number in present if number != void}
    return Objects(masks, numbers == void)


def _coco(images: Path, file: Path) -> MaskedPictures:
    coco = _open_coco(file)
    pictures: list[MaskedPicture] = []
    absent: list[Path] = []
    for number in coco.getImgIds():
        name = str(coco.imgs[number]["file_name"])
        if (images / name).is_file():
            pictures.append(MaskedPicture(name, images / name, partial(_read_coco, coco, number, name)))
        else:
            absent.append(Path(name))
    pictures.sort(key=lambda picture: picture.name)
    return MaskedPictures(pictures, _missing("annotated pictures are not there", absent))


def _open_coco(file: Path) -> Any:
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise UserError(
            "COCO annotations are read by pycocotools, which is not here: pip install pycocotools"
        ) from None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = content
            coco.createIndex()
        if not all("file_name" in image for image in coco.imgs.values()):
            raise KeyError("file_name")
    except OSError as error:
        raise UserError(f"--masks {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--masks {file} is not a COCO file with images and annotations ({type(error).__name__}: {error})"
        ) from error
    return coco


def _read_coco(coco: Any, number: int, name: str) -> Objects:
    try:
        size = (int(coco.imgs[number]["height"]), int(coco.imgs[number]["width"]))
        masks: dict[str, BoolArray] = {}
        crowd = np.zeros(size, bool)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[number])):
            if not annotation.get("segmentation"):
                continue
            mask = _drawn(coco, annotation)
            if annotation.get("iscrowd"):
                crowd |= mask
            elif mask.any():
                masks[f"{_category(coco, annotation)} {annotation['id']}"] = mask
    except Exception as error:  # on damaged annotations pycocotools raises nearly anything
        raise BrokenImageError(
            name, f"its annotations are damaged ({type(error).__name__}: {error})"
        ) from error
    judged = np.any(list(masks.values()), axis=0) if masks else np.zeros(size, bool)
    return Objects(masks, crowd & ~judged)


def _drawn(coco: Any, annotation: dict[str, Any]) -> BoolArray:
    with warnings.catch_warnings():
        # pycocotools 2.0 makes its arrays in a way that numpy 2 still accepts, with a warning to its authors.
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(coco.annToMask(annotation), bool)


def _category(coco: Any, annotation: dict[str, Any]) -> str:
    category = coco.cats.get(annotation.get("category_id"), {})
    return str(category.get("name", "object"))
