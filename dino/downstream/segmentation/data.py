"""Pictures and, for each, a mask: a file of the same size with the number of a class for every pixel.

data = open_data("camvid/", ignore=(11, 255))
image, places = data.train.read(0)    # (rows, cols, 3) uint8 RGB; (rows, cols) int16, the classes' places

A folder holds `images/` and `masks/` (or `annotations/`, `labels/`), in each `train/` and `val/`, in which a mask has
the path of its picture but for the suffix; ADE20k is such a folder. Imports no torch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from dino.downstream.segmentation.classes import (
    NAMES_FILE,
    Classes,
    PlaceArray,
    UnknownIdError,
    listed,
    read_ade_names,
    read_class_names,
)
from dino.runtime.files import expanded
from dino.runtime.images import BrokenImageError, decode, is_picture_name, reading
from dino.runtime.options import UserError
from dino.runtime.picture_files import files_in
from dino.runtime.pictures import VAL_NAMES
from dino.runtime.progress import progress

TRAIN_NAMES = ("train", "training")
MASK_FOLDERS = ("masks", "annotations", "labels")

_ADE_NAMES_FILE = "objectInfo150.txt"
_ADE_CLASSES = 150

# Without loss only: elsewhere the edges of objects hold numbers of classes that are not there.
_MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes that hold numbers

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap rows and columns
_THREADS = 8  # that look through masks: Pillow decodes without the interpreter's lock


@dataclass(frozen=True)
class MaskedPicture:
    """A picture and its mask: its name within the data, and both files."""

    name: str
    picture: Path
    mask: Path


@dataclass(frozen=True)
class MaskedPictures:
    """Pictures with masks, in the order of their names, and what their numbers mean."""

    pictures: list[MaskedPicture]
    classes: Classes

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, index: int) -> tuple[NDArray[np.uint8], PlaceArray]:
        """The upright picture (rows, cols, 3) uint8 RGB, and the place of each pixel's class (rows, cols).

        Raises:
            BrokenImageError: the picture or the mask cannot be read, or they do not go together.
        """
        entry = self.pictures[index]
        image = np.asarray(decode(entry.picture, entry.name))
        ids = read_ids(entry.mask)
        if ids.shape != image.shape[:2]:
            raise BrokenImageError(str(entry.mask), _sizes(ids.shape[::-1], image.shape[1::-1]))
        try:
            return image, self.classes.places(ids)
        except UnknownIdError as error:
            raise BrokenImageError(
                str(entry.mask), f"has pixels of {error.number}, which is no class"
            ) from error


@dataclass(frozen=True)
class SegmentationData:
    """The two parts of the data; one of them may be empty, where nothing asks for it."""

    train: MaskedPictures
    val: MaskedPictures
    notes: list[str]  # sentences on what was left out or assumed

    @property
    def classes(self) -> Classes:
        return self.val.classes


def open_data(
    data_path: str,
    *,
    ignore: Sequence[int] = (255,),
    num_classes: int = 0,
    reduce_zero_label: bool | None = None,
    known: Classes | None = None,
    fallback: Classes | None = None,
    need_train: bool = True,
    look_through: bool = True,
) -> SegmentationData:
    """Both parts of a folder's pictures, and their classes.

    The classes are those that `classes.txt` in the folder lists (ADE20k: its own table, or 150), without the ignored
    ones; else the first `num_classes` numbers that are not ignored; else those of `fallback`, or the numbers that the
    masks hold.

    Args:
        ignore: numbers of the pixels that count for no class.
        num_classes: 0: as many as the names or the masks say.
        reduce_zero_label: 0 is no class either, and the classes begin with 1; None: in ADE20k's layout.
        known: the classes, whatever the folder says.
        fallback: the classes, where the folder and `num_classes` do not say.
        need_train: False: only val will be used, and train may be missing.
        look_through: read every mask once now, and refuse what does not fit, instead of when it is its turn.

    Raises:
        UserError: there is no such folder, no pair of a picture and a mask, or a mask that cannot be one.
    """
    root = expanded(data_path, "--data_path")
    if not (root / "images").is_dir():
        raise UserError(
            f"--data_path {data_path}: a folder is needed that holds images/ and {_either(MASK_FOLDERS)}, "
            "each with train/ and val/"
        )
    masks = _first_folder(root, MASK_FOLDERS, f"--data_path {data_path} has images/ but no")
    notes: list[str] = []
    train = _part(root / "images", masks, TRAIN_NAMES, notes) if need_train else []
    val = _part(root / "images", masks, VAL_NAMES, notes)
    is_ade = masks.name == "annotations" and (root / "images" / "training").is_dir()
    ignored = frozenset(ignore)
    if is_ade if reduce_zero_label is None else reduce_zero_label:
        ignored |= {0}
        notes.append("masks as in ADE20k: 0 is no class, and the first has number 1")
    classes = known or _told_classes(root, ignored, num_classes, is_ade) or fallback
    if classes in (known, fallback) and classes is not None:
        classes = replace(classes, ignored=(classes.ignored | ignored) - set(classes.ids))
    if classes is None or look_through:
        classes = _look_through([*train, *val], classes, ignored)
    return SegmentationData(MaskedPictures(train, classes), MaskedPictures(val, classes), notes)


def read_ids(path: Path) -> NDArray[np.int64]:
    """The numbers (rows, cols) in a mask: Pillow keeps those of a palette, which OpenCV turns into colours.

    Raises:
        NotAMaskError: it holds colours.
        BrokenImageError: it cannot be read.
    """
    with reading(str(path)), Image.open(path) as image:
        if image.mode not in _NUMBERS:
            raise NotAMaskError(
                str(path), f"holds {image.mode} colours; a mask holds numbers, in palette or grey"
            )
        return np.asarray(image).astype(np.int64)


class NotAMaskError(BrokenImageError):
    """A picture of colours where a mask should be."""


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"{name}/" for name in names)


def _first_folder(root: Path, names: Sequence[str], complaint: str) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        raise UserError(f"{complaint} {_either(names)}")
    return found


def _part(images: Path, masks: Path, names: Sequence[str], notes: list[str]) -> list[MaskedPicture]:
    """The pairs of one part; what has no partner is noted."""
    pictures = _first_folder(images, names, f"{images} has no")
    files_of_masks = _first_folder(masks, (pictures.name, *names), f"{masks} has no")
    mask_of = _by_stem(files_of_masks, lambda name: name.lower().endswith(_MASK_SUFFIXES))
    picture_of = _by_stem(pictures, is_picture_name)
    _note(notes, f"pictures of {pictures} have no mask", picture_of.keys() - mask_of.keys())
    _note(notes, f"masks of {files_of_masks} have no picture", mask_of.keys() - picture_of.keys())
    pairs = [
        MaskedPicture(f"{pictures.name}/{name.as_posix()}", pictures / name, files_of_masks / mask_of[stem])
        for stem, name in picture_of.items()
        if stem in mask_of
    ]
    if not pairs:
        raise UserError(
            f"no picture of {pictures} ({len(picture_of)}) has a mask in {files_of_masks} ({len(mask_of)}); a mask "
            f"has its picture's path but for the suffix, which is one of {', '.join(_MASK_SUFFIXES)}"
        )
    return pairs


def _by_stem(folder: Path, wanted: Callable[[str], bool]) -> dict[PurePath, PurePath]:
    try:
        names = [PurePath(name) for name in sorted(files_in(folder)) if wanted(name)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    by_stem: dict[PurePath, PurePath] = {}
    for name in names:
        other = by_stem.setdefault(name.with_suffix(""), name)
        if other != name:
            raise UserError(f"{folder} holds both {other} and {name}: which of them is it? Remove one")
    return by_stem


def _note(notes: list[str], what: str, stems: set[PurePath]) -> None:
    if stems:
        notes.append(f"{len(stems)} {what} ({listed([stem.as_posix() for stem in sorted(stems)])})")


def _told_classes(root: Path, ignored: frozenset[int], num_classes: int, is_ade: bool) -> Classes | None:
    """As far as they are known without the masks."""
    names: dict[int, str] = {}
    if (root / NAMES_FILE).is_file():
        names = read_class_names(root / NAMES_FILE)
    elif is_ade and (root / _ADE_NAMES_FILE).is_file():
        names = read_ade_names(root / _ADE_NAMES_FILE)
    count = num_classes or (_ADE_CLASSES if is_ade and not names else 0)
    if not names:
        return Classes.numbered(count, ignored) if count else None
    classes = Classes.named(names, ignored)
    if count and len(classes) != count:
        raise UserError(
            f"--num_classes {count}: the names in {root} are of {len(classes)} classes that are not ignored; leave "
            "the option out, or name with --ignore what is no class"
        )
    return classes


def _look_through(
    entries: Sequence[MaskedPicture], classes: Classes | None, ignored: frozenset[int]
) -> Classes:
    """The classes that are told, or that the masks hold; the masks are known to be of them afterwards.

    A file that cannot be read is not refused here: it may be skipped later.

    Raises:
        UserError: a mask holds colours, is of another size than its picture, or has a number that is no class.
    """
    present: dict[int, Path] = {}  # the first mask that has it
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(_numbers, entries)
        for entry, numbers in zip(entries, progress(found, "masks", "mask", total=len(entries)), strict=True):
            for number in numbers:
                present.setdefault(number, entry.mask)
    if classes is None:
        classes = Classes.named(dict.fromkeys(present, ""), ignored)
    for number in sorted(set(present) - set(classes.ids) - classes.ignored):
        raise UserError(
            f"{present[number]} has pixels of number {number}, which is no class: the classes are "
            f"{classes.described()}; if {number} is none, name it with --ignore, else in {NAMES_FILE} or by a larger "
            "--num_classes"
        )
    return classes


def _numbers(entry: MaskedPicture) -> list[int]:
    """What numbers a mask holds; none where a file cannot be read."""
    try:
        ids = read_ids(entry.mask)
        size = _upright_size(entry)
    except NotAMaskError as error:
        raise UserError(f"{error}; save the number of its class for every pixel") from error
    except BrokenImageError:
        return []
    if size != ids.shape[::-1]:
        raise UserError(f"{entry.mask}: {_sizes(ids.shape[::-1], size)}")
    if ids.min() >= 0 and ids.max() < 2**16:
        return np.flatnonzero(np.bincount(ids.ravel())).tolist()  # several times faster than sorting
    return np.unique(ids).tolist()


def _upright_size(entry: MaskedPicture) -> tuple[int, int]:
    """(width, height) from the picture's first bytes."""
    with reading(entry.name), Image.open(entry.picture) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    return (height, width) if turned else (width, height)


def _sizes(mask: tuple[int, ...], picture: tuple[int, ...]) -> str:
    return f"the mask is {mask[0]} x {mask[1]} pixels, the upright picture {picture[0]} x {picture[1]}; make them alike"
