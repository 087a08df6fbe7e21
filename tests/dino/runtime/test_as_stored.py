"""Pictures read as torchvision's ImageFolder reads them, which published accuracies were measured with."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageCms
from torchvision.datasets.folder import default_loader

from dino.runtime.images import decode
from dino.runtime.pictures import Spread, open_pictures

SHARED = Path(__file__).parents[4] / "shared" / "data" / "images-odd"


def noise(mode: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def wide_grey() -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16))


def palette() -> Image.Image:
    return noise("RGB").quantize(16)


def cmyk_profile() -> bytes:
    # Any profile will do to tell whether it was looked at; a damaged one is not applied.
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# Name of the file: the picture, how it is saved, and whether the default reading gives something else.
ODD = {
    "turned.jpg": (lambda: noise("RGB"), {"exif": turned()}, True),
    "turned.png": (lambda: noise("RGB"), {"exif": turned()}, True),
    "grey16.png": (wide_grey, {}, True),
    "grey16.tif": (wide_grey, {}, True),
    "float.tif": (
        lambda: Image.fromarray(np.linspace(0, 1, 384, dtype=np.float32).reshape(16, 24)),
        {},
        True,
    ),
    "transparent.png": (lambda: noise("RGBA"), {}, True),
    "transparent_grey.png": (lambda: noise("LA"), {}, True),
    "transparent.webp": (lambda: noise("RGBA"), {"lossless": True}, True),
    "transparent_palette.png": (palette, {"transparency": 3}, True),
    "transparent_palette.gif": (palette, {"transparency": 3}, True),
    "palette.png": (palette, {}, False),
    "grey.jpg": (lambda: noise("L"), {}, False),
    "cmyk.jpg": (lambda: noise("CMYK"), {}, False),
    "cmyk_with_profile.tif": (lambda: noise("CMYK"), {"icc_profile": cmyk_profile()}, False),
    "plain.png": (lambda: noise("RGB"), {}, False),
    "plain.webp": (lambda: noise("RGB"), {}, False),
    "bits.png": (lambda: noise("L").convert("1"), {}, False),
}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, (make, settings, _) in ODD.items():
        make().save(folder / name, **settings)
    return folder


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # of the oracle
@pytest.mark.parametrize("name", ODD)
def test_every_kind_of_picture_is_what_torchvisions_loader_gives(odd: Path, name: str) -> None:
    file = odd / name
    expected = default_loader(str(file))
    found = decode(file, name, as_stored=True)
    assert (found.mode, found.size) == ("RGB", expected.size)
    assert np.array_equal(found, expected)
    default = decode(file, name)
    assert (default.size != expected.size or not np.array_equal(default, expected)) is ODD[name][2]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared odd pictures are not here")
@pytest.mark.parametrize(
    "name",
    [
        "cmyk_no_profile.jpg",
        "cmyk_with_icc.jpg",
        "derived_cat_gray16.png",
        "derived_coffee_palette_transparent.png",
        "derived_dogs_rgba.png",
        "exif5_mirrored.jpg",
        "exif8_portrait.jpg",
        "rgba_dice.webp",
        "animated_newtonscradle.gif",
    ],
)
def test_pictures_of_the_world_are_what_torchvisions_loader_gives(name: str) -> None:
    assert np.array_equal(decode(SHARED / name, name, as_stored=True), default_loader(str(SHARED / name)))


def test_a_folder_and_a_part_of_it_are_read_as_asked(odd: Path) -> None:
    expected = np.asarray(default_loader(str(odd / "turned.jpg")))
    whole = open_pictures(str(odd))
    place = [Path(whole.name(index)).name for index in range(len(whole))].index("turned.jpg")
    part = Spread(whole, len(whole))
    upright = part.picture(place)
    assert upright.size == (16, 24)
    part.as_stored = True
    assert part.as_stored and whole.as_stored
    assert np.array_equal(part.picture(place), expected) and np.array_equal(whole.picture(place), expected)
    part.as_stored = False
    assert np.array_equal(part.picture(place), upright)


def test_pictures_in_shards_are_read_as_asked(odd: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(odd / "turned.jpg", "turned.jpg")
    pictures = open_pictures(str(tmp_path / "shard.tar"))
    assert pictures.picture(0).size == (16, 24)
    pictures.as_stored = True
    assert np.array_equal(pictures.picture(0), default_loader(str(odd / "turned.jpg")))


def test_pictures_of_a_torchvision_set_are_read_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    noise("RGBA").save(stream, "PNG", exif=turned())

    class Set:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.open(stream), 0

    monkeypatch.setattr(torchvision.datasets, "FakeData", Set)
    pictures = open_pictures("FakeData")
    assert pictures.picture(0).size == (16, 24)
    pictures.as_stored = True
    assert np.array_equal(pictures.picture(0), noise("RGBA").convert("RGB"))
