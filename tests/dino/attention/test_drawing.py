"""Which files a picture gives and what is in them; how each style is drawn is in test_marks.py."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.attention.drawing import STYLES, Look, Picture
from dino.attention.marks import AttentionOverlay, ContourOverlay, HeadColors, MaskOverlay, cut_out
from dino.attention.render import enlarge, heat, mass_mask, normalize

SIZE = (37, 52)


def picture(**features: np.ndarray) -> Picture:
    random = np.random.default_rng(0)
    names = ("mean", "head0", "head3")
    weights = {name: random.random((5, 7), dtype=np.float32) for name in names}
    image = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    return Picture(image, weights, {name: normalize(weights[name]) for name in names}, features)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image if image.mode == "RGBA" else image.convert("RGB"))


def test_files_are_called_as_by_dinos_script(tmp_path: Path):
    names = Look(8, threshold=0.5).save(tmp_path, ("heat", "mask"), picture())
    assert names == [
        *("attn-mean.png", "attn-head0.png", "attn-head3.png"),
        *("mask_th0.5_mean.png", "mask_th0.5_head0.png", "mask_th0.5_head3.png"),
    ]
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())


@pytest.mark.parametrize("smooth", [False, True])
def test_heat_is_every_patch_in_its_colour(tmp_path: Path, smooth: bool):
    drawn = picture()
    Look(8, colormap="viridis", smooth=smooth).save(tmp_path, ("heat",), drawn)
    expected = heat(enlarge(drawn.scaled["head3"], 8, SIZE, smooth=smooth), "viridis")
    difference = np.abs(pixels(tmp_path / "attn-head3.png").astype(int) - expected)
    assert difference.max() <= (12 if smooth else 0)


def test_every_style_is_its_mark(tmp_path: Path):
    drawn = picture()
    look = Look(8, opacity=0.3, threshold=0.4)
    look.save(tmp_path, STYLES, drawn)
    weights, scaled, image = drawn.weights["head3"], drawn.scaled["head3"], drawn.image
    kept = mass_mask(weights, 0.4)
    expected = {
        "overlay-head3.png": AttentionOverlay(opacity=0.3)(image, scaled, 8),
        "contour-head3.png": ContourOverlay()(image, weights, 8),
        "mask_th0.4_head3.png": MaskOverlay()(image, kept, 8),
        "cutout_th0.4_head3.png": cut_out(image, kept, 8),
        "colors.png": HeadColors(0.4)(image, np.stack([drawn.weights["head0"], weights]), 8, [0, 3]),
    }
    for name, mark in expected.items():
        np.testing.assert_array_equal(pixels(tmp_path / name), mark, err_msg=name)


def test_what_is_no_attention_has_a_file_of_its_own_and_no_mask(tmp_path: Path):
    similarity = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    colours = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    drawn = picture(similarity=similarity, pca=colours)
    names = Look(8).save(tmp_path, ("mask",), drawn)
    assert [name for name in names if not name.startswith("mask_")] == ["similarity.png", "pca.png"]
    np.testing.assert_array_equal(pixels(tmp_path / "similarity.png"), heat(enlarge(similarity, 8, SIZE)))
    np.testing.assert_array_equal(pixels(tmp_path / "pca.png")[::8, ::8], colours)
    for style in ("mask", "contour", "heat"):
        np.testing.assert_array_equal(
            Look(8).panel(style, "similarity", drawn), heat(enlarge(similarity, 8, SIZE))
        )


def test_a_head_has_the_colour_of_its_number_whichever_others_are_drawn():
    image, maps = picture().image, np.eye(35, dtype=np.float32)[[4, 20]].reshape(2, 5, 7)
    drawn = Picture(image, {"mean": maps[0], "head5": maps[0], "head3": maps[1]}, {}, {})
    found = Look(8).panel("colors", "", drawn)
    for head, patch in ((5, 4), (3, 20)):
        row, col = 8 * (patch // 7), 8 * (patch % 7)
        expected = 0.55 * np.array(HeadColors().color(head)) + 0.45 * image[row, col]
        np.testing.assert_allclose(found[row, col], expected, atol=1)
