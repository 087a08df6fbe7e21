"""The gallery in a real browser, its pixels against numpy; skipped where there is no browser."""

import base64
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dino.attention.gallery import Gallery, PageLook
from dino.attention.marks import HeadColors
from dino.attention.render import enlarge, heat, mass_mask, normalize
from tests.dino.attention.in_browser import Opener, nameless, screen, settle

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow

PATCH = 16


def picture(rows: int = 200, cols: int = 488, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((cols, rows), Image.Resampling.BICUBIC))


def weights(heads: int, rows: int = 13, cols: int = 31, seed: int = 0) -> np.ndarray:
    """With many equal values: ties decide what the smallest set is."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 12, (heads, rows, cols)) * rng.integers(1, 9, (heads, 1, 1))).astype(np.float32)


def quantised(maps: np.ndarray) -> np.ndarray:
    """The weights that the page has, float32: uint16 relative to each head's maximum."""
    tops = maps.max(axis=(1, 2), keepdims=True).astype(np.float64)
    return (np.rint(maps / tops * 65535) * (tops / 65535)).astype(np.float32)


def gallery(folder: Path, *pictures: tuple[str, np.ndarray, np.ndarray], **options: object) -> Path:
    page = Gallery(folder, "Attention", "a note", PageLook(**options))
    for name, image, maps in pictures:
        page.add_picture(name, image, maps, PATCH, folder)
    return page.write()


def canvas(page: Any, number: int = 0) -> np.ndarray:
    """Pixels that are drawn over a picture, (rows, cols, 4) RGBA."""
    data = page.locator(".frame canvas").nth(number).evaluate("(canvas) => canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


def choose(page: Any, *labels: str) -> None:
    for label in labels:
        page.get_by_label(label, exact=True).check()
    settle(page)


def assert_heat(
    drawn: np.ndarray, values: np.ndarray, colormap: str = "inferno", smooth: bool = False, **scale: object
) -> None:
    scaled = normalize(values, **(scale or {"percentiles": (0, 99.5)}))
    expected = heat(enlarge(scaled, PATCH, drawn.shape[:2], smooth=smooth), colormap)
    assert (drawn[..., 3] == 255).all()
    off = np.abs(drawn[..., :3].astype(int) - expected).max(axis=-1)
    assert off.max() <= 8, "no further than a neighbouring colour of the table"
    assert (off > 0).mean() < 0.01, "and that only where rounding decides"


def test_heat_is_what_numpy_draws_of_the_same_heads(tmp_path: Path, show: Opener):
    maps = np.random.default_rng(1).random((3, 13, 31), dtype=np.float32) ** 4
    page = show(gallery(tmp_path, ("a", picture(), maps)))
    heads = quantised(maps)
    assert canvas(page).shape == (200, 488, 4)
    assert_heat(canvas(page), heads.mean(axis=0))
    choose(page, "Smooth", "viridis", "Max")
    assert_heat(canvas(page), heads.max(axis=0), "viridis", smooth=True)
    page.get_by_role("button", name="Head 1", exact=True).click()
    settle(page)
    assert_heat(canvas(page), heads[[0, 2]].max(axis=0), "viridis", smooth=True)
    choose(page, "Mean", "turbo")
    page.get_by_role("button", name="Head 2", exact=True).dblclick()
    settle(page)
    assert_heat(canvas(page), heads[2], "turbo", smooth=True)


def test_the_page_has_the_scale_of_the_files(tmp_path: Path, show: Opener):
    maps = np.random.default_rng(1).random((2, 13, 31), dtype=np.float32) ** 4 / 100
    few = np.where(np.arange(403).reshape(1, 13, 31) == 77, 0.5, 1e-3).astype(np.float32)
    for options, scale in (
        ({"percentiles": (20.0, 80.0)}, {"percentiles": (20, 80)}),
        ({"scale": (0.5, 2.0)}, {"limits": (0.5 / 403, 2 / 403)}),
    ):
        page = show(gallery(tmp_path, ("a", picture(), maps), ("b", picture(), few), **options))
        assert_heat(canvas(page), quantised(maps).mean(axis=0), **scale)
        assert_heat(canvas(page, 1), quantised(few)[0], **scale)


def test_the_heads_that_were_asked_for_are_on_and_the_others_a_click_away(tmp_path: Path, show: Opener):
    page = Gallery(tmp_path, "t")
    page.add_picture("a", picture(), weights(6), PATCH, tmp_path, on=(5, 3))
    opened = show(page.write())
    on = opened.locator(".head[aria-pressed=true]")
    assert on.all_inner_texts() == ["3", "5"]
    assert opened.locator(".readout").inner_text().startswith("The mean of heads 3 and 5")
    choose(opened, "Colours")
    colours = {tuple(colour) for colour in canvas(opened)[..., :3].reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), HeadColors().color(3), HeadColors().color(5)}
    opened.get_by_role("button", name="All", exact=True).click()
    settle(opened)
    assert on.count() == 6


def test_the_mask_is_the_smallest_set_of_patches_at_every_threshold(tmp_path: Path, show: Opener):
    maps = weights(3)
    page = show(gallery(tmp_path, ("a", picture(), maps)))
    heads = quantised(maps)
    choose(page, "Mask")
    mean = (heads.astype(np.float64).sum(axis=0) / 3).astype(np.float32)
    cases = [("Mean", mean), ("Max", heads.max(axis=0)), (None, heads[0])]
    for how, values in cases:
        if how:
            choose(page, how)
        else:
            page.get_by_role("button", name="Head 0", exact=True).click(modifiers=["Shift"])
        for threshold in (0, 1, 10, 33, 50, 60, 61, 95, 99, 100):
            page.locator("#threshold").fill(str(threshold))
            settle(page)
            drawn = canvas(page)
            outside = (drawn == (0, 0, 0, 255)).all(axis=-1)
            expected = enlarge(mass_mask(values, threshold / 100), PATCH, (200, 488)) > 0
            np.testing.assert_array_equal(~outside, expected, err_msg=f"{how} {threshold} %")


def test_the_mask_of_random_weights_equals_numpys_in_a_thousand_cases(tmp_path: Path, show: Opener):
    page = show(gallery(tmp_path, ("a", picture(), weights(1))))
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(0, rng.integers(2, 60), 77).astype(np.float32) * np.float32(rng.random())
        keeps = [*np.round(rng.random(17), 3).tolist(), 0, 0.5, 1]
        kept = page.evaluate(
            "([values, keeps]) => keeps.map((keep) => [...massMask(rank(Float32Array.from(values)), keep)])",
            [values.tolist(), keeps],
        )
        np.testing.assert_array_equal(kept, [mass_mask(values[None], keep)[0] for keep in keeps])


def test_words_tell_what_the_mask_shows(tmp_path: Path, show: Opener):
    maps = weights(4)
    page = show(gallery(tmp_path, ("dogs", picture(), maps), threshold=0.25))
    mask = mass_mask(quantised(maps)[2], 0.25)
    area = Fraction(int((enlarge(mask, PATCH, (200, 488)) > 0).sum()), 200 * 488)
    page.get_by_role("button", name="Head 2", exact=True).dblclick()
    settle(page)
    readout = page.locator(".readout").inner_text()
    assert readout.startswith("Head 2 keeps 25 % of its attention in ")
    said = float(readout.removesuffix(" % of the picture.").rpartition(" ")[2])
    assert said == pytest.approx(100 * float(area), abs=0.51)
    sync_api.expect(page.get_by_role("status")).to_have_text(f"dogs: {readout}")
    page.get_by_role("button", name="None", exact=True).click()
    settle(page)
    assert page.locator(".readout").inner_text() == "No head is switched on."
    assert not canvas(page).any()
    page.get_by_role("button", name="All", exact=True).click()
    settle(page)
    assert page.locator(".readout").inner_text().startswith("The mean of all 4 heads keeps 25 %")


def test_the_slider_moves_between_original_and_attention(tmp_path: Path, show: Opener):
    page = show(gallery(tmp_path, ("dogs", picture(), weights(2))))
    slider = page.get_by_role("slider", name="Part of dogs")
    both = {}
    for value, said in (("0", "original"), ("100", "100 %"), ("50", "50 %")):
        slider.fill(value)
        both[value] = screen(page)
        assert page.locator(".split .shown").inner_text() == said
    shown = {value: pixels[5:-5] for value, pixels in both.items()}  # without the rounded corners
    middle = shown["0"].shape[1] // 2
    assert np.abs(shown["100"] - shown["0"]).mean() > 10
    np.testing.assert_array_equal(shown["50"][:, : middle - 2], shown["100"][:, : middle - 2])
    np.testing.assert_array_equal(shown["50"][:, middle + 2 :], shown["0"][:, middle + 2 :])
    original = np.asarray(Image.fromarray(picture()).resize(both["0"].shape[1::-1]), int)
    assert np.abs(both["0"] - original).mean() < 4

    box = page.locator(".frame").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 60, steps=3)
    page.mouse.up()
    assert slider.input_value() == "25"
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "26", "what is dragged has the focus"


def test_opacity_goes_from_the_original_to_the_heat_alone(tmp_path: Path, show: Opener):
    page = show(gallery(tmp_path, ("a", picture(), weights(2))))
    opacity = page.get_by_role("slider", name="Opacity")
    shown = []
    for value in ("0", "50", "100"):
        opacity.fill(value)
        shown.append(screen(page))
    assert np.abs((shown[0] + shown[2]) / 2 - shown[1]).max() <= 2


def test_each_head_colours_what_it_keeps_and_the_larger_share_wins(tmp_path: Path, show: Opener):
    maps = np.random.default_rng(3).random((3, 13, 31), dtype=np.float32) ** 3 * np.float32(1e-3)
    maps[1] *= 50
    page = show(gallery(tmp_path, ("a", picture(), maps), threshold=0.7))
    choose(page, "Colours")
    heads = quantised(maps)
    expected = np.zeros((13, 31, 4), int)
    for row, col in np.ndindex(13, 31):
        shares = [head[row, col] / head.sum() if mass_mask(head, 0.7)[row, col] else 0 for head in heads]
        colour = HeadColors().color(int(np.argmax(shares)))
        expected[row, col] = (*colour, 255) if any(shares) else (0, 0, 0, 150)
    large = expected.repeat(PATCH, axis=0).repeat(PATCH, axis=1)[:200, :488]
    np.testing.assert_array_equal(canvas(page), large)
    covered = 100 * (large[..., 3] == 255).mean()
    readout = page.locator(".readout").inner_text()
    assert readout == (
        f"All 3 heads keep 70 % of their attention each, together in {round(covered)} % of the picture."
    )


def test_heads_are_switched_everywhere_or_in_one_picture(tmp_path: Path, show: Opener):
    page = show(gallery(tmp_path, ("a", picture(), weights(2)), ("b", picture(), weights(3, seed=1))))
    pressed = "(all) => all.map((one) => one.getAttribute('aria-pressed') === 'true')"
    heads = page.locator(".head")
    heads.nth(0).click()
    settle(page)
    assert heads.evaluate_all(pressed) == [False, True, False, True, False]
    page.get_by_label("Same heads everywhere").uncheck()
    heads.nth(4).click()
    settle(page)
    assert heads.evaluate_all(pressed) == [False, True, False, True, True]
    page.get_by_label("Same heads everywhere").check()
    settle(page)
    assert heads.evaluate_all(pressed) == [False, True, False, True, True]


def test_everything_can_be_done_with_the_keyboard(tmp_path: Path, show: Opener):
    page = show(gallery(tmp_path, *((name, picture(), weights(3)) for name in "abc")))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.evaluate("document.documentElement.dataset.view") == "mask"
    before = canvas(page)
    page.keyboard.press("Tab")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.locator("#threshold").input_value() == "40" and (canvas(page) != before).any()
    page.locator(".enlarge").nth(1).focus()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    page.keyboard.press("2")
    settle(page)
    assert page.locator(".readout").nth(1).inner_text().startswith("The mean of heads 0 and 1")
    page.keyboard.press("Shift+Digit1")
    settle(page)
    assert page.locator(".readout").nth(1).inner_text().startswith("Head 1 keeps 40 %")
    page.keyboard.press("Enter")
    names = []
    for _ in range(4):
        names.append(page.locator("dialog h2").inner_text())
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("0")
    settle(page)
    assert names == ["b", "c", "a", "b"]
    assert page.locator("dialog .readout").inner_text().startswith("The mean of heads 0 and 1 keeps 40 %")
    np.testing.assert_array_equal(canvas(page, 3), canvas(page, 1))
    page.keyboard.press("Escape")
    settle(page)
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Enlarge b"
    assert page.locator("#dock #bar").count() == 1


def test_names_are_text_and_links_open_files(tmp_path: Path, show: Opener):
    name = "a #1 100% ünï 'q' \"d\" </script><script>window.hacked=1</script><img src=x onerror=hacked=1>"
    folder = tmp_path / name.replace("/", ":")
    folder.mkdir()
    page = Gallery(tmp_path, name, note=name)
    Image.fromarray(picture()).save(folder / "q? #.png")
    page.add_picture(name, picture(), weights(2), PATCH, folder, ["q? #.png"])
    opened = show(page.write())
    assert opened.locator("h2").first.inner_text() == opened.title() == name
    opened.locator(".files summary").click()
    opened.get_by_role("link", name="q? #.png").click()
    assert opened.locator("img").evaluate("(image) => image.naturalWidth") == 488
    opened.go_back()
    settle(opened)
    opened.locator(".enlarge").click()
    assert opened.locator("dialog h2").inner_text() == name
    assert opened.evaluate("typeof hacked") == "undefined"


def odd_pictures() -> list[tuple[str, np.ndarray, np.ndarray]]:
    zero, lost = np.zeros((4, 13, 31), np.float32), np.full((1, 13, 31), np.nan, np.float32)
    return [
        ("sixteen heads", picture(), weights(16)),
        ("one head", picture(), weights(1)),
        ("no attention", picture(), zero),
        ("no numbers", picture(), lost),
        ("level", picture(), zero + 1),
        ("one pixel", picture(1, 1), weights(1, 1, 1) + 1),
        ("strip", picture(10, 1072), weights(3, 1, 67)),
        ("pole", picture(1072, 10), weights(3, 67, 1)),
        ("a_name_without_any_place_to_break_a_line_" * 3, picture(), weights(2)),
    ]


@pytest.mark.parametrize("view", ["Heat", "Mask", "Colours"])
def test_odd_maps_and_shapes_are_shown_as_well(tmp_path: Path, show: Opener, view: str):
    page = show(gallery(tmp_path, *odd_pictures()), width=360, height=740, has_touch=True, is_mobile=True)
    page.get_by_role("button", name="Settings").click()
    choose(page, view)
    said = []
    for number in range(page.locator(".picture").count()):
        page.locator(".picture").nth(number).scroll_into_view_if_needed()
        page.wait_for_timeout(50)
        settle(page)
        said.append(page.locator(".readout").nth(number).inner_text())
        width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        assert width == 360, "nothing to scroll sideways on a phone"
    assert said[2:4] == ["All 4 heads have no attention to show.", "Head 0 has no attention to show."]
    assert said[5].endswith("in 100 % of the picture.") and not any("NaN" in text for text in said)
    page.locator(".enlarge").nth(6).click()
    settle(page)
    assert page.locator("dialog").evaluate("(one) => one.scrollWidth <= one.clientWidth")


def test_only_pictures_near_the_screen_are_decoded_and_drawn(tmp_path: Path, show: Opener):
    page = show(gallery(tmp_path, *((str(n), picture(), weights(2)) for n in range(60))))
    drawn = "[...document.querySelectorAll('.frame canvas')].flatMap((one, n) => (one.width ? [n] : []))"
    first = page.evaluate(drawn)
    assert first and first[0] == 0 and len(first) < 20
    page.locator(".picture").last.scroll_into_view_if_needed()
    page.wait_for_timeout(100)
    settle(page)
    last = page.evaluate(drawn)
    assert last[-1] == 59 and last[0] > first[-1]
    assert page.evaluate("pictures.flatMap((one, n) => (one.decoded ? [n] : []))") == last


def clip(path: Path, frames: int = 24) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            image = np.full((48, 64, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_videos_play_in_place(tmp_path: Path, show: Opener):
    page = Gallery(tmp_path, "Videos")
    page.add_video("clip #1", [(label, clip(tmp_path / f"{label} #1.mp4")) for label in ("overlay", "grid")])
    opened = show(page.write())
    opened.get_by_role("button", name="Play all in step").click()
    opened.wait_for_timeout(600)
    states = opened.locator("video").evaluate_all(
        "(all) => all.map((one) => [one.readyState >= 2, one.currentTime > 0.1, one.videoWidth, one.duration])"
    )
    assert states == [[True, True, 64, 2]] * 2
    opened.get_by_role("button", name="Pause all").click()
    assert opened.locator("video").evaluate_all("(all) => all.every((one) => one.paused)")


def test_every_control_has_a_name(tmp_path: Path, show: Opener):
    page = Gallery(tmp_path, "t")
    page.add_picture("a", picture(), weights(3), PATCH, tmp_path)
    page.add_video("v", [("overlay", clip(tmp_path / "a.mp4", 3))])
    opened = show(page.write())
    for view in ("Mask", "Colours", "Heat"):
        choose(opened, view)
        assert nameless(opened) == []
    for name in ("View", "Colour map", "How heads are combined", "Heads of a"):
        assert opened.get_by_role("group", name=name, exact=True).count() == 1
    opened.locator(".enlarge").click()
    assert nameless(opened) == []


def test_dark_and_light_follow_the_system(tmp_path: Path, show: Opener):
    path = gallery(tmp_path, ("a", picture(), weights(1)))
    light, dark = (screen(show(path, color_scheme=scheme), "header") for scheme in ("light", "dark"))
    assert np.median(light) > 230 and np.median(dark) < 40
    assert light.min() < 60 and dark.max() > 200, "and the letters do as well"


def test_without_scripts_the_pictures_are_there(tmp_path: Path, show: Opener):
    page = show(gallery(tmp_path, ("a", picture(), weights(1))), java_script_enabled=False)
    assert page.get_by_role("img", name="a").is_visible() and not page.locator("#bar").is_visible()
