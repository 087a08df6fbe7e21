"""How long does a core take for the views of a picture? Ours against torchvision's transforms on Pillow, in turns.

python benchmarks/multicrop.py --output benchmarks/results/multicrop.json

From the bytes of a JPEG to 2 + 8 views, in one process with one thread: all of it, as with `--augment_on workers`;
and the workers' part alone, as with `--augment_on device`. The pictures are parts of two photographs, 500 x 375
pixels at quality 90, or those of a folder. Numbers are milliseconds per picture.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import transforms

from benchmarks.comparison import Comparison, ComparisonOptions, check, in_turns, milliseconds, report
from dino.batched_distortions import OnDevice
from dino.loader import Batch
from dino.multicrop import MultiCrop, View, Views
from dino.runtime.images import IMAGENET_MEAN, IMAGENET_STD, decode
from dino.runtime.options import UserError, command, option

_SIZE = (500, 375)
_QUALITY = 90
_PEER = "torchvision v1 transforms on Pillow"


@dataclass(frozen=True)
class MulticropOptions(ComparisonOptions):
    data_path: str = option("", "Folder of JPEGs to take; empty = parts of two photographs.")
    pictures: int = option(32, "Pictures in each measurement.")
    global_crops_size: int = option(224, "Side of a global view in pixels.")
    local_crops_size: int = option(96, "Side of a local view in pixels.")
    local_crops_number: int = option(8, "Local views per picture.")


class PillowBlur:
    """Blur with a radius of 0.1 to 2 pixels, with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, picture: Image.Image) -> Image.Image:
        if torch.rand(()).item() >= self.p:
            return picture
        return picture.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))


def torchvision_transform(view: View) -> Callable[[Image.Image], Tensor]:
    """The view as main_dino.py makes it: an RGB picture -> a normalised float32 tensor (3, size, size)."""
    jitter = transforms.ColorJitter(*view.jitter)
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, scale=view.scale, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(view.grayscale),
            PillowBlur(view.blur),
            transforms.RandomSolarize(128, p=view.solarize),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def comparisons(options: MulticropOptions) -> Iterator[Comparison]:
    files = _files(options)
    crop = MultiCrop(
        global_size=options.global_crops_size,
        local_size=options.local_crops_size,
        global_scale=(0.4, 1.0),
        local_scale=(0.05, 0.4),
        local_number=options.local_crops_number,
    )
    peer = [torchvision_transform(view) for view in crop.views]

    def theirs() -> None:
        for file in files:
            with Image.open(io.BytesIO(file)) as image:
                picture = image.convert("RGB")
            for transform in peer:
                transform(picture)

    def ours(make: Callable[[Image.Image], list[Tensor] | Views]) -> None:
        for file in files:
            make(decode(io.BytesIO(file), "picture", at_least=4 * options.global_crops_size))

    with _one_thread():
        rows = (
            ("multi-crop: decode to normalised views", crop.__call__, 4.0, ""),
            (
                "multi-crop: the workers' part, augment_on device",
                crop.cropped,
                8.0,
                _device_half(crop, files),
            ),
        )
        for path, make, target, note in rows:
            times = in_turns(theirs, lambda make=make: ours(make), turns=options.turns)
            peers, own = ([time / len(files) for time in each] for each in times)
            rates = f"pictures/s of a core: {1e3 / median(peers):.0f} theirs, {1e3 / median(own):.0f} ours"
            yield Comparison(
                path, "ms", peers, own, _PEER, "uint8", target, "; ".join(filter(None, (rates, note)))
            )


def _device_half(crop: MultiCrop, files: list[bytes]) -> str:
    """What is left to the device, on one core, for information."""
    made = [crop.cropped(decode(io.BytesIO(file), "picture")) for file in files]
    views = [torch.stack(same_view) for same_view in zip(*(each.views for each in made), strict=True)]
    batch = Batch(views, [], torch.stack([each.distortions for each in made]))
    finish = OnDevice(torch.device("cpu"))
    finish(batch)
    taken = median(milliseconds(lambda: finish(batch)) for _ in range(3)) / len(files)
    return f"the device's part takes {taken:.1f} ms per picture on one core of the CPU"


def _files(options: MulticropOptions) -> list[bytes]:
    if options.data_path:
        paths = sorted(p for p in Path(options.data_path).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        if not paths:
            raise UserError(
                f"--data_path {options.data_path} holds no .jpg or .jpeg files: name a folder that does"
            )
        chosen = np.linspace(0, len(paths) - 1, min(options.pictures, len(paths))).astype(int)
        return [paths[index].read_bytes() for index in chosen]
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    return [_part(photographs[index % 2], index) for index in range(options.pictures)]


def _part(photograph: Image.Image, index: int) -> bytes:
    free = [have - need for have, need in zip(photograph.size, _SIZE, strict=True)]
    left, top = (37 * index % (room + 1) for room in free)
    jpeg = io.BytesIO()
    photograph.crop((left, top, left + _SIZE[0], top + _SIZE[1])).save(jpeg, "JPEG", quality=_QUALITY)
    return jpeg.getvalue()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1), cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0]), cv2.setNumThreads(before[1])


def measure(options: MulticropOptions) -> None:
    check(options)
    if options.pictures < 1:
        raise UserError(f"--pictures must be 1 or more, got {options.pictures}")
    report(comparisons(options), options)


if __name__ == "__main__":
    command(MulticropOptions, measure, prog="benchmarks/multicrop.py", description=__doc__ or "")
