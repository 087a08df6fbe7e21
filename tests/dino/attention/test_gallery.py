"""What the gallery page holds, read back with Python's own html parser and Pillow."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dino.attention.gallery import Gallery, PageLook
from dino.runtime.options import UserError

AWKWARD = "a b #1 100% ünï 'q' \"d\" </script><script>alert(1)<!-- & amp.jpg"


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2].append(data)

    def find(self, tag, **wanted):
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    def links(self):
        return [attributes["href"] for attributes, _ in self.find("a") if attributes["href"] != "#outputs"]

    def maps(self, picture=0):
        return json.loads(self.find("script", **{"class": "maps"})[picture][1])


def picture(rows=40, cols=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8)


def weights(heads, rows, cols, seed=0):
    return np.random.default_rng(seed).random((heads, rows, cols), dtype=np.float32)


def decoded(stored):
    """The weights as the page has them, float64 (H, R, C)."""
    levels = [np.frombuffer(base64.b64decode(head), "<u2") for head in stored["heads"]]
    heads = np.stack(levels).reshape(len(levels), stored["rows"], stored["cols"])
    return heads * (np.array(stored["tops"])[:, None, None] / 65535)


def write(folder, *pictures):
    gallery = Gallery(folder, "title")
    for name, image, maps, patch_size in pictures:
        gallery.add_picture(name, image, maps, patch_size, folder)
    return Page(gallery.write())


def test_weights_are_held_within_a_65535th_of_each_heads_maximum(tmp_path):
    maps = weights(3, 5, 8) * np.array([1.0, 1e-4, 30.0], np.float32)[:, None, None]
    stored = write(tmp_path, ("a", picture(), maps, 8)).maps()
    error = np.abs(decoded(stored) - maps) / maps.max(axis=(1, 2), keepdims=True)
    assert error.max() <= 0.5 / 65535 + 1e-7
    sides = [stored[key] for key in ("rows", "cols", "patch", "height", "width")]
    assert sides == [5, 8, 8, 40, 60]


def test_weights_that_are_no_number_count_as_zero(tmp_path):
    maps = np.array([[[np.nan, np.inf, 2.0, -1.0]], [[0, 0, 0, 0]], [[np.nan] * 4]], np.float32)
    stored = write(tmp_path, ("a", picture(4, 16), maps, 4)).maps()
    np.testing.assert_array_equal(decoded(stored), [[[0, 0, 2, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]])


@pytest.mark.parametrize(
    ("rows", "cols", "side"), [(200, 200, 1), (201, 203, 2), (450, 1000, 4), (2, 40_001, 2)]
)
def test_too_many_patches_are_averaged_over_blocks_and_the_page_says_so(tmp_path, rows, cols, side):
    maps = weights(2, rows, cols)
    page = write(tmp_path, ("large", picture(rows, cols), maps, 1))
    stored = page.maps()
    padded = np.pad(
        maps.astype(float), ((0, 0), (0, -rows % side), (0, -cols % side)), constant_values=np.nan
    )
    blocks = padded.reshape(2, padded.shape[1] // side, side, -1, side)
    kept = decoded(stored)
    assert kept[0].size <= 40_000 and stored["patch"] == side
    np.testing.assert_allclose(kept, np.nanmean(blocks, axis=(2, 4)), atol=2e-5)
    assert (f"blocks of {side} &times; {side} patches" in page.html) == (side > 1)


def test_the_last_blocks_average_the_patches_that_there_are(tmp_path):
    maps = np.zeros((1, 201, 201), np.float32)
    maps[0, 200, 200], maps[0, 0, 200], maps[0, 0, 0] = 1, 1, 1
    kept = decoded(write(tmp_path, ("a", picture(201, 201), maps, 1)).maps())
    np.testing.assert_allclose(kept[0, [-1, 0, 0], [-1, -1, 0]], [1, 0.5, 0.25], atol=1e-5)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((40, 60), (60, 40)), ((1072, 2000), (960, 515)), ((3000, 7), (2, 960)), ((1, 1), (1, 1))],
)
def test_the_preview_is_the_picture_at_960_pixels_or_its_own_size(tmp_path, size, shown):
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size).astype(np.uint8)
    image = np.repeat(ramp[..., None], 3, axis=2)
    maps = weights(1, *(-(-side // 16) for side in size))
    (attributes, _) = write(tmp_path, ("a", image, maps, 16)).find("img", alt="a")[0]
    data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
    preview = Image.open(io.BytesIO(data))
    assert preview.size == shown == (int(attributes["width"]), int(attributes["height"]))
    expected = np.asarray(Image.fromarray(image).resize(shown, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(preview, float) - expected).mean() < 3


def test_colours_are_those_of_matplotlib(tmp_path):
    page = write(tmp_path, ("a", picture(), weights(1, 5, 8), 8))
    tables = json.loads(page.find("script", id="colormaps")[0][1])
    assert len(tables) >= 3
    for name, table in tables.items():
        expected = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
        np.testing.assert_array_equal(
            np.frombuffer(base64.b64decode(table), np.uint8).reshape(-1, 3), expected
        )


def test_the_controls_begin_as_the_files_are_drawn(tmp_path):
    look = PageLook(threshold=0.25, colormap="cividis", opacity=0.9, smooth=True)
    gallery = Gallery(tmp_path, "title", look=look)
    gallery.add_picture("a", picture(), weights(1, 5, 8), 8, tmp_path)
    page = Page(gallery.write())
    radios = [each for each, _ in page.find("input", name="colormap")]
    assert [each["value"] for each in radios] == ["cividis", "inferno", "viridis", "turbo", "gray"]
    assert ["checked" in each for each in radios] == [True, False, False, False, False]
    assert list(json.loads(page.find("script", id="colormaps")[0][1])) == [each["value"] for each in radios]
    values = [page.find("input", id=name)[0][0].get("value") for name in ("threshold", "opacity")]
    assert values == ["25", "90"] and "checked" in page.find("input", id="smooth")[0][0]
    assert (
        "checked"
        not in write(tmp_path, ("a", picture(), weights(1, 5, 8), 8)).find("input", id="smooth")[0][0]
    )


def test_nothing_of_a_name_becomes_markup(tmp_path):
    gallery = Gallery(tmp_path, AWKWARD, note=AWKWARD)
    gallery.add_picture(AWKWARD, picture(), weights(2, 5, 8), 8, tmp_path / AWKWARD.replace("/", ":"))
    gallery.add_video(AWKWARD, [(AWKWARD, tmp_path / "a.mp4"), (AWKWARD, tmp_path / "a.gif")], note=AWKWARD)
    page = Page(gallery.write())
    assert page.html.count("<script") == page.html.count("</script") == 5
    assert [page.find(tag)[0][1].strip() for tag in ("title", "h1", "h2", "h3")] == [AWKWARD] * 4
    assert page.find("img")[0][0]["alt"] == AWKWARD


def test_links_lead_to_the_files_whatever_they_are_called(tmp_path):
    gallery = Gallery(tmp_path / "out", "title")
    folder = tmp_path / "out" / AWKWARD.replace("/", ":")
    folder.mkdir(parents=True)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for file in (folder / "img.png", folder / "c#%41.npz", elsewhere / "v?.mp4"):
        file.touch()
    gallery.add_picture("a", picture(), weights(2, 5, 8), 8, folder, ["img.png", "c#%41.npz"])
    gallery.add_video("v", [("overlay", elsewhere / "v?.mp4"), ("frames", elsewhere)])
    page = Page(gallery.write())
    addresses = [*page.links(), *(attributes["src"] for attributes, _ in page.find("video"))]
    targets = [(tmp_path / "out" / unquote(address)).resolve() for address in addresses]
    named = [
        elsewhere / "v?.mp4",
        elsewhere,
        elsewhere / "v?.mp4",
        folder / "c#%41.npz",
        folder / "img.png",
        folder,
    ]
    assert sorted(targets) == sorted(path.resolve() for path in named)
    assert not any(re.search(r"[\s\"'<>#?]", address) for address in addresses)


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_name_that_is_no_text_is_shown_and_linked(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    gallery = Gallery(tmp_path, "title")
    gallery.add_picture(folder.name, picture(), weights(1, 5, 8), 8, folder)
    page = Page(gallery.write())
    assert page.find("h2")[0][1] == "caf?"
    assert page.links() == ["caf%E9/"]


def test_only_the_files_of_the_picture_are_linked(tmp_path):
    (tmp_path / "holiday.png").touch()
    gallery = Gallery(tmp_path, "title")
    gallery.add_picture("a", picture(), weights(1, 5, 8), 8, tmp_path, ["maps.npz", "img.png"])
    page = Page(gallery.write())
    assert page.links() == ["img.png", "maps.npz", "./"] and "Full-size files (2)" in page.html


def test_the_heads_that_were_asked_for_are_on_at_first(tmp_path):
    gallery = Gallery(tmp_path, "title")
    gallery.add_picture("some", picture(), weights(6, 5, 8), 8, tmp_path, on=(3, 5))
    gallery.add_picture("all", picture(), weights(3, 5, 8), 8, tmp_path)
    articles = [attributes for attributes, _ in Page(gallery.write()).find("article")]
    assert [(each["data-heads"], each["data-on"]) for each in articles] == [("6", "3,5"), ("3", "0,1,2")]


def test_the_page_says_on_which_scale_it_shows_weights(tmp_path):
    for options, expected, words in (
        (
            {},
            {"percentiles": [0.0, 99.5], "even": None},
            "from percentile 0 to percentile 99.5 of the weights",
        ),
        (
            {"percentiles": (1.0, 90.0)},
            {"percentiles": [1.0, 90.0], "even": None},
            "percentile 1 to percentile 90",
        ),
        ({"scale": (0.0, 5.0)}, {"even": [0.0, 5.0]}, "all on one scale, from 0 to 5 times an even share"),
    ):
        gallery = Gallery(tmp_path, "title", look=PageLook(**options))
        gallery.add_picture("a", picture(201, 203), weights(1, 201, 203), 1, tmp_path)
        page = Page(gallery.write())
        scale = json.loads(page.find("script", id="scale")[0][1])
        assert expected.items() <= scale.items()
        assert words in re.sub(r"\s+", " ", page.html)
        assert page.maps()["patches"] == 201 * 203, "even shares are of all patches, averaged or not"


def test_pictures_beyond_what_a_browser_opens_are_linked_to(tmp_path, monkeypatch):
    monkeypatch.setattr("dino.attention.gallery._MOST_LETTERS", 20_000)
    gallery = Gallery(tmp_path, "title")
    for number in range(9):
        gallery.add_picture(f"picture {number}", picture(), weights(1, 5, 8), 8, tmp_path / f"{number} #")
    page = Page(gallery.write())
    shown = len(page.find("article"))
    assert 0 < shown < 9 and f"too large with {9 - shown} more" in page.html
    named = [text.strip() for _, text in page.find("a") if text.startswith("picture ")]
    assert named == [f"picture {number}" for number in range(shown, 9)]
    assert page.links()[shown:] == [f"{number}%20%23/" for number in range(shown, 9)]


def test_videos_play_in_place_and_other_files_are_linked(tmp_path):
    gallery = Gallery(tmp_path, "title")
    gallery.add_video("clip", [(n, tmp_path / n) for n in ("a.MP4", "b.gif", "frames.zip")], note="24 fps")
    page = Page(gallery.write())
    ((video, _),) = page.find("video")
    assert {"controls", "loop", "playsinline"} <= set(video) and video["preload"] == "metadata"
    assert (video["src"], page.find("img", src="b.gif")[0][0]["alt"]) == ("a.MP4", "clip, b.gif")
    assert "frames.zip" in page.links() and "24 fps" in page.html
    assert not page.find("article", **{"class": "card picture"})


def test_the_page_asks_no_network_and_lets_none_be_asked(tmp_path):
    page = write(tmp_path, ("a", picture(), weights(1, 5, 8), 8))
    allowed = ("http://www.w3.org/2000/svg",)  # the name of a format, never fetched
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^'\" )]*", page.html)) <= set(allowed)
    assert not page.find("link") and all("src" not in attributes for attributes, _ in page.find("script"))
    policy = page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert policy.startswith("default-src 'none'") and "http" not in policy


def test_a_gallery_of_nothing_says_so(tmp_path):
    assert "Nothing to show" in Page(Gallery(tmp_path / "new", "t").write()).html


def test_pictures_are_left_as_they_are(tmp_path):
    image, maps = picture(1200, 1300), weights(2, 75, 82)
    before = image.copy(), maps.copy()
    write(tmp_path, ("a", image, maps, 16))
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(maps, before[1])


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 5, 7), "40 x 60 pixels has 5 x 8 patches of 8, got a map of 5 x 7"),
        ((5, 8), "maps are .heads, rows, cols., of one head at least, got .5, 8."),
        ((0, 5, 8), "of one head at least"),
        ((1, 2, 5, 8), "maps are .heads, rows, cols."),
    ],
)
def test_maps_of_another_grid_are_refused(tmp_path, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        Gallery(tmp_path, "t").add_picture("a", picture(), np.ones(shape, np.float32), 8, tmp_path)


def test_a_threshold_beyond_the_whole_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1, got 60"):
        PageLook(threshold=60)


def test_a_page_that_cannot_be_written_is_one_sentence_and_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*index\.html"):
        Gallery(tmp_path / "file", "t").write()
    old = Gallery(tmp_path, "old").write().read_bytes()

    def full_disk(self, data, **_):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(UserError, match="No space left"):
        Gallery(tmp_path, "new").write()
    assert (tmp_path / "index.html").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"file", "index.html"}
