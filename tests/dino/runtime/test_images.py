import io
import os
import pickle
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from dino.runtime.images import MAX_PIXELS, BrokenImageError, LargeJpegError, decode, rgb, suffixes

SHARED = Path(__file__).parents[4] / "shared" / "data"
ODD = SHARED / "images-odd"

# What each file must become: the size of the upright picture, or the reason why there is none.
EXPECTED = {
    "animated_newtonscradle.gif": (200, 150),
    "animated_squares.webp": (80, 80),
    "bad_exif_spitfire.jpg": (800, 531),
    "bad_huffman.jpg": (1024, 768),
    "bad_mpo_header.jpg": (640, 480),
    "bomb_65536x65536.png": "4295 Mpx, the limit is 128 Mpx",
    "broken_data_stream.png": "damaged: unrecognized data stream contents when reading image file",
    "cmyk_no_profile.jpg": (500, 333),
    "cmyk_with_icc.jpg": (500, 333),
    "corrupt.jpg": "damaged: broken data stream when reading image file",
    "corrupt_header.jpg": "truncated after 1,024 bytes",
    "derived name with späce & ünïcode.JPG": (268, 151),
    "derived_1x1.png": (1, 1),
    "derived_cat_gray16.png": (902, 600),
    "derived_cat_rgb16.png": (902, 600),
    "derived_coffee_palette.png": (600, 400),
    "derived_coffee_palette_transparent.png": (600, 400),
    "derived_dogs_cmyk.jpg": (1072, 603),
    "derived_dogs_gray.jpg": (1072, 603),
    "derived_dogs_rgba.png": (536, 301),
    "derived_png_named.jpg": (451, 300),
    "derived_samoyed_truncated60.jpg": "truncated after 396,826 bytes",
    "derived_strip_1072x10.jpg": (1072, 10),
    "derived_tiny_20x14.png": (20, 14),
    "exif5_mirrored.jpg": (1800, 1200),
    "exif6_landscape.jpg": (1800, 1200),
    "exif6_rommel_3072x2304.jpg": (2304, 3072),
    "exif8_portrait.jpg": (1200, 1800),
    "gray_alpha_heart.png": (400, 300),
    "gray_concert.jpg": (400, 267),
    "junk_header.jpg": (1024, 768),
    "palette_pil123p.png": (162, 150),
    "palette_swiss.png": (68, 68),
    "png16_gray_synthetic.png": (64, 48),
    "png16_rgb_synthetic.png": (64, 48),
    "rgba_bird.png": (576, 384),
    "rgba_dice.webp": (200, 150),
    "text_not_image.jpg": "not a picture that Pillow can read",
    "tree.webp": (1024, 772),
    "truncated.jpg": "truncated after 10,000 bytes",
    "truncated_image.png": "truncated after 81,920 bytes",
    "zero_byte.jpg": "empty file",
}

needs_odd_pictures = pytest.mark.skipif(not ODD.is_dir(), reason="the shared odd pictures are not here")


def stored(image: Image.Image, form: str, **options: object) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream


def random_image(mode: str = "RGB", size: tuple[int, int] = (7, 5)) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b.convert("RGB").resize(a.size), float)).mean())


def reason(file: Path | io.BytesIO) -> str:
    with pytest.raises(BrokenImageError) as caught:
        decode(file, "name")
    assert caught.value.name == "name"
    return caught.value.reason


# The shared odd pictures


@needs_odd_pictures
@pytest.mark.parametrize("name", EXPECTED)
def test_every_odd_file_becomes_the_right_picture_or_the_right_reason(name: str) -> None:
    expected = EXPECTED[name]
    if isinstance(expected, str):
        assert reason(ODD / name) == expected
        return
    picture = decode(ODD / name, name)
    assert (picture.mode, picture.size) == ("RGB", expected)


@needs_odd_pictures
def test_no_odd_file_is_left_out() -> None:
    assert {file.name for file in ODD.iterdir()} - set(EXPECTED) == {"giant_20000x14000_gray.jpg"}


@needs_odd_pictures
@pytest.mark.parametrize(
    ("name", "original", "tolerance"),
    [
        ("derived_cat_gray16.png", "cat_chelsea_451x300.png", None),
        ("derived_cat_rgb16.png", "cat_chelsea_451x300.png", 6),
        ("derived_png_named.jpg", "cat_chelsea_451x300.png", 1),
        ("derived_coffee_palette.png", "coffee_600x400.png", 8),
        ("derived_dogs_cmyk.jpg", "two_dogs_1072x603.jpg", 3),
        ("derived_dogs_gray.jpg", "two_dogs_1072x603.jpg", None),
    ],
)
def test_odd_copies_look_like_their_originals(name: str, original: str, tolerance: float | None) -> None:
    with Image.open(SHARED / "images" / original) as reference:
        if tolerance is None:
            reference, tolerance = reference.convert("L"), 6
        assert mean_difference(decode(ODD / name, name), reference) < tolerance


@needs_odd_pictures
def test_an_embedded_cmyk_profile_is_used() -> None:
    path = ODD / "cmyk_with_icc.jpg"
    with Image.open(path) as cmyk:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(cmyk.info["icc_profile"]))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
        by_profile = ImageCms.applyTransform(cmyk, transform)
        naive = cmyk.convert("RGB")
    picture = decode(path, "cmyk")
    assert mean_difference(picture, by_profile) < 1 < mean_difference(picture, naive)


@needs_odd_pictures
def test_transparent_parts_are_white() -> None:
    for name in ("derived_dogs_rgba.png", "gray_alpha_heart.png", "rgba_dice.webp", "animated_squares.webp"):
        assert decode(ODD / name, name).getpixel((0, 0)) == (255, 255, 255)


@needs_odd_pictures
def test_a_giant_is_decoded_only_where_it_shrinks_below_the_limit() -> None:
    path = ODD / "giant_20000x14000_gray.jpg"
    assert decode(path, "giant", at_least=224).size == (2500, 1750)
    assert reason(path) == "280 Mpx, the limit is 128 Mpx"


def test_of_too_many_pixels_fewer_can_be_read_from_a_jpeg_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino.runtime.images.MAX_PIXELS", 2000)
    with pytest.raises(LargeJpegError, match=r"^a: 0 Mpx, the limit is"):
        decode(jpeg((400, 300)), "a")
    with pytest.raises(LargeJpegError):
        decode(jpeg((400, 300)), "a", at_least=200)
    assert decode(jpeg((400, 300)), "a", at_least=10).size == (50, 38)
    with pytest.raises(BrokenImageError) as caught:
        decode(png_header(400, 300), "a", at_least=10)
    assert not isinstance(caught.value, LargeJpegError)


@needs_odd_pictures
def test_every_photograph_is_far_below_the_limit() -> None:
    for path in sorted((SHARED / "images").iterdir()):
        assert decode(path, path.name).mode == "RGB"


# Modes


@pytest.mark.parametrize("form", ["BMP", "PNG", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI"])
def test_lossless_formats_give_the_stored_pixels(form: str) -> None:
    image = random_image()
    assert np.array_equal(decode(stored(image, form), form), image)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_by_its_range(form: str, dtype: str) -> None:
    values = np.array([[0, 128, 129, 255, 257, 4095], [10000, 32768, 40000, 65278, 65407, 65535]], dtype)
    picture = np.asarray(decode(stored(Image.fromarray(values), form), "grey"))
    assert np.array_equal(picture, np.rint(values / 257)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 100, 255], "int32", [0, 100, 255]),
        ([-5, 257, 65535], "int32", [0, 1, 255]),
        ([0, 100_000, 1_000_000], "int32", [0, 26, 255]),
        ([0, 0.2, 1], "float32", [0, 51, 255]),
        ([np.nan, 100, 200.4], "float32", [0, 100, 200]),
        ([0, 0, 0], "float32", [0, 0, 0]),
    ],
)
def test_integers_and_floats_are_scaled_by_the_range_they_fit(
    values: list[float], dtype: str, expected: list[int]
) -> None:
    stream = stored(Image.fromarray(np.array([values], dtype)), "TIFF")
    assert np.asarray(decode(stream, "grey"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("top", [1023, 65535])
def test_a_dark_16_bit_pgm_stays_dark(top: int) -> None:
    values = np.array([[0, 1, top // 300]], ">u2")
    picture = decode(io.BytesIO(b"P5 3 1 %d\n" % top + values.tobytes()), "dark")
    assert np.array_equal(np.asarray(picture)[..., 0], np.rint(values / top * 255))


def test_black_and_white_is_0_and_255() -> None:
    picture = decode(stored(Image.fromarray(np.array([[True, False]])), "PNG"), "bits")
    assert np.asarray(picture).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    image = random_image(mode)
    values = np.asarray(image).astype(float)
    alpha = values[..., -1:] / 255
    expected = alpha * values[..., :-1] + (1 - alpha) * 255
    picture = np.asarray(decode(stored(image, "PNG"), "alpha"), float)
    assert np.abs(picture - expected).max() <= 1


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_the_transparent_colour_of_a_palette_is_white(transparency: int | bytes) -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([200, 0, 0, 0, 200, 0])
    picture = decode(stored(image, "PNG", transparency=transparency), "palette")
    assert np.asarray(picture).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_lab_is_converted_by_its_definition() -> None:
    colour = Image.new("RGB", (2, 2), (180, 90, 40))
    lab = ImageCms.profileToProfile(
        colour, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert mean_difference(decode(stored(lab, "TIFF"), "lab"), colour) < 2


def test_cmyk_with_a_useless_profile_is_converted_plainly() -> None:
    image = random_image("CMYK")
    expected = image.convert("RGB")
    for profile in (b"junk", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        picture = decode(stored(image, "TIFF", icc_profile=profile), "cmyk")
        assert np.array_equal(picture, expected)


# Orientation


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_orientation_is_that_of_pillow(orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = random_image()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    stream = stored(image, "PNG", exif=exif)
    with Image.open(stream) as opened:
        expected = rgb(ImageOps.exif_transpose(opened))
    picture = decode(stream, "turned")
    assert np.array_equal(picture, expected)
    assert np.array_equal(rgb(picture), expected), "turned twice"


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00junk", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00MM\x00*"]
)
def test_junk_exif_changes_nothing(exif: bytes) -> None:
    image = random_image()
    assert np.array_equal(decode(stored(image, "PNG", exif=exif), "junk"), image)


# Size


def jpeg(size: tuple[int, int], **options: object) -> io.BytesIO:
    gradient = np.add.outer(np.linspace(0, 120, size[1]), np.linspace(0, 120, size[0]))
    return stored(Image.fromarray(gradient.astype(np.uint8)).convert("RGB"), "JPEG", quality=95, **options)


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        (None, (803, 601)),
        (151, (803, 601)),
        (150, (402, 301)),
        (75, (201, 151)),
        (37, (101, 76)),
        (1, (101, 76)),
    ],
)
def test_a_jpeg_is_reduced_only_down_to_twice_what_is_enough(
    at_least: int | None, expected: tuple[int, int]
) -> None:
    stream = jpeg((803, 601))
    whole = decode(stream, "jpeg")
    picture = decode(stream, "jpeg", at_least=at_least)
    assert picture.size == expected
    assert mean_difference(picture, whole) < 2


def test_a_reduced_jpeg_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(jpeg((800, 400), exif=exif), "jpeg", at_least=100).size == (200, 400)


def png_header(width: int, height: int) -> io.BytesIO:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    chunk += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk)


def test_a_bomb_is_refused_before_it_is_decoded_and_pillow_keeps_its_limit() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    assert reason(png_header(MAX_PIXELS + 1_000_000, 1)) == "129 Mpx, the limit is 128 Mpx"
    assert reason(png_header(60_000, 60_000)) == "3600 Mpx, the limit is 128 Mpx"
    assert limit == Image.MAX_IMAGE_PIXELS


def test_threads_restore_warnings_and_limit() -> None:
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS)
    content = jpeg((400, 300)).getvalue()
    sizes = []

    def work() -> None:
        sizes.extend(decode(io.BytesIO(content), "jpeg").size for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [(400, 300)] * 80
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before


# Errors


def test_what_is_no_file_is_named_with_a_reason(tmp_path: Path) -> None:
    assert reason(tmp_path / "none.jpg") == "no such file or directory"
    assert reason(tmp_path) == "is a directory"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "a pipe or a device, not a file"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_no_cut_gives_a_picture_or_another_exception(form: str) -> None:
    content = stored(random_image(size=(64, 48)), form).getvalue()
    for length in range(0, len(content) // 2, max(len(content) // 40, 1)):
        assert reason(io.BytesIO(content[:length]))


def test_postscript_is_not_run() -> None:
    script = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert reason(script) == "not a picture that Pillow can read"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_a_picture_outlives_its_file_and_can_be_sent_to_another_process(form: str) -> None:
    stream = stored(random_image(), form)
    picture = decode(stream, form)
    stream.close()
    assert np.array_equal(pickle.loads(pickle.dumps(picture)), picture)


def test_memory_that_is_not_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("dino.runtime.images.rgb", no_memory)
    assert reason(stored(random_image(), "PNG")) == "not enough memory"


def test_the_error_reads_as_a_sentence_and_survives_the_way_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BrokenImageError("a.jpg", "empty file")))
    assert (str(error), error.name, error.reason) == ("a.jpg: empty file", "a.jpg", "empty file")


def test_suffixes_are_those_of_pictures_that_pillow_decodes() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".jp2", ".mpo"} < suffixes()
    assert suffixes().isdisjoint({".pdf", ".mpg", ".eps", ".h5", ".wmf", ".txt", ""})
