"""The command and pictures that are odd, broken, too large, awkwardly called, or in the way of their own outputs."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dino.attention.marks import HeadColors
from dino.attention.visualize import run
from dino.runtime.options import UserError
from tests.dino.attention.small_drawings import ALWAYS, HEADS, names, options, pixels, save_picture


def test_heads_are_picked_by_those_that_can_be_read(tmp_path: Path, capsys):
    source = tmp_path / "in"
    save_picture(source / "last.png")
    for index in range(20):
        (source / f"{index}.png").touch()
    run(options(source, tmp_path / "out", heads="auto", gallery=False))
    said = capsys.readouterr().out
    assert "which on 1 picture and its mirror image" in said and "Drew 1 picture of 21 inputs" in said


def test_a_picture_without_the_point_is_skipped_and_the_others_drawn(tmp_path: Path, capsys):
    source = tmp_path / "in"
    save_picture(source / "large.png", 60, 90)
    save_picture(source / "small.png", 40, 50)
    run(options(source, tmp_path / "out", heads="mean", similar_to=(70, 20)))
    assert names(tmp_path / "out") == {"large", "index.html"}
    assert f"skipped: {source / 'small.png'}: the point 70 20 lies outside" in capsys.readouterr().out


def test_a_jpeg_beyond_the_limit_is_told_to_be_shrunk_and_then_is(tmp_path: Path, monkeypatch):
    source = save_picture(tmp_path / "a.jpg", 240, 320)
    monkeypatch.setattr("dino.runtime.images.MAX_PIXELS", 10_000)
    with pytest.raises(
        UserError, match=r"a\.jpg: 0 Mpx, the limit .*shrunk while it is read if --image_size"
    ):
        run(options(source, tmp_path / "out"))
    run(options(source, tmp_path / "out", image_size=(30,), heads="mean"))
    assert pixels(tmp_path / "out" / "img.png").shape == (30, 40, 3)
    png = save_picture(tmp_path / "a.png", 240, 320)
    with pytest.raises(UserError, match=r"Mpx$"):
        run(options(png, tmp_path / "out", image_size=(30,)))


def test_names_that_are_no_text_or_more_than_one_line_are_drawn(tmp_path: Path, capsys):
    source = tmp_path / "in"
    good = [save_picture(source / name) for name in (os.fsdecode(b"caf\xe9.png"), "two\nlines.png")]
    (source / os.fsdecode(b"\xe9.png")).touch()
    run(options(source, tmp_path / "out"))
    assert f"skipped: {source}/?.png: empty file" in capsys.readouterr().out
    for file in good:
        folder = tmp_path / "out" / file.stem
        assert names(folder) == ALWAYS
        assert json.loads((folder / "attention.json").read_text())["input"] == str(file)


def test_no_input_is_overwritten_by_outputs_beside_it(tmp_path: Path):
    sources = [
        save_picture(tmp_path / name, 60, 60)
        for name in ("a.png", "a/img.png", "sheet.png", "index.html.png")
    ]
    before = [file.read_bytes() for file in sources]
    run(options(tmp_path, tmp_path, image_size=(32,)))
    assert [file.read_bytes() for file in sources] == before
    assert names(tmp_path / "a-2") == ALWAYS and names(tmp_path / "a") == {"img.png", "img"}
    assert (tmp_path / "index.html").is_file() and names(tmp_path / "index.html-2") == ALWAYS


def test_a_third_run_knows_the_outputs_of_the_first(tmp_path: Path, capsys):
    save_picture(tmp_path / "a.png")
    for heads in ("all", "0", "0"):
        run(options(tmp_path, tmp_path, heads=heads))
        assert "Drew 1 picture into" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "attention.json").read_text())
    assert {"attn-head3.png"} <= set(record["earlier_files"]) and "attn-head3.png" not in record["files"]


def test_large_pictures_are_tiled_on_request(tmp_path: Path, capsys):
    source = save_picture(tmp_path / "a.png", 80, 400)
    for tile in (0, 96):
        run(options(source, tmp_path / str(tile), tile=tile, npz=True))
        said = "pictures larger than 96 pixels are computed in tiles" in capsys.readouterr().out
        assert said == bool(tile)
    whole, tiled = (np.load(tmp_path / str(tile) / "maps.npz")["attention"] for tile in (0, 96))
    assert whole.shape == tiled.shape == (HEADS, 5, 25)
    assert (whole != tiled).any()


def test_the_sheet_has_the_scale_of_the_files_and_a_legend_of_the_colours(tmp_path: Path):
    source = save_picture(tmp_path / "a.png", 64, 96)
    sheets = {}
    for name, others in (
        ("own", {}),
        ("dark", {"scale": (1e6, 2e6)}),
        ("colors", {"draw": ("heat", "colors"), "heads": "1,3"}),
        ("plain", {"heads": "1,3"}),
    ):
        run(options(source, tmp_path / name, **others))
        sheets[name] = pixels(tmp_path / name / "sheet.png")
    assert np.unique(sheets["dark"][60:, 400:].reshape(-1, 3), axis=0).shape[0] < 300
    assert sheets["own"].shape == sheets["dark"].shape and (sheets["own"] != sheets["dark"]).any()
    for head in range(HEADS):
        color = HeadColors().color(head)
        spots = [(sheets[name] == color).all(axis=-1).sum() > 50 for name in ("plain", "colors")]
        assert spots == [False, head in (1, 3)]


def test_home_is_found_in_names(tmp_path: Path, monkeypatch):
    save_picture(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    run(options("~/a.png", Path("~/out"), heads="mean"))
    assert "attn-mean.png" in names(tmp_path / "out")


# What cannot be read at all; each is named and left out.
_BROKEN = {
    *(
        "truncated.jpg",
        "derived_samoyed_truncated60.jpg",
        "corrupt.jpg",
        "corrupt_header.jpg",
        "zero_byte.jpg",
    ),
    *("broken_data_stream.png", "truncated_image.png", "text_not_image.jpg", "bomb_65536x65536.png"),
}


@pytest.mark.slow
def test_all_odd_pictures_are_drawn_upright_and_whole_or_named(tmp_path: Path, shared_data: Path, capsys):
    odd = shared_data / "images-odd"
    run(options(odd, tmp_path, image_size=(64,), heads="mean"))
    said = capsys.readouterr().out
    skipped = {Path(line.split(": ")[1]).name for line in said.splitlines() if line.startswith("skipped: ")}
    assert skipped == _BROKEN
    pictures = [file for file in odd.iterdir() if file.name not in _BROKEN]
    assert f"Drew {len(pictures)} pictures" in said
    assert len(list(tmp_path.glob("**/attn-mean.png"))) == len(pictures)
    assert pixels(tmp_path / "exif6_landscape" / "img.png").shape == (64, 96, 3)
    assert pixels(tmp_path / "giant_20000x14000_gray" / "img.png").shape == (64, 91, 3)
    for name, shape in (("derived_1x1.png", (1, 1)), ("derived_strip_1072x10.jpg", (10, 1072))):
        run(options(odd / name, tmp_path / "own", heads="mean"))
        assert pixels(tmp_path / "own" / "attn-mean.png").shape == (*shape, 3)
