"""The command for pictures: which files it writes, what is in them, and what it says to mistakes."""

import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.attention.maps import attention_maps
from dino.attention.render import enlarge, heat, mass_mask, normalize
from dino.attention.visualize import main, run
from dino.runtime.backbones import create_backbone
from dino.runtime.options import UserError
from tests.dino.attention.small_drawings import ALWAYS, ARCH, NAMES, names, options, pixels, save_picture


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A backbone and the file of its weights."""
    torch.manual_seed(1)
    backbone = create_backbone(ARCH).eval()
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(backbone.state_dict(), file)
    return backbone, str(file)


def test_one_picture_gives_the_files_of_dinos_script_at_the_pictures_size(tmp_path: Path, capsys):
    source = save_picture(tmp_path / "a.png")
    out = tmp_path / "new" / "out"
    run(options(source, out, threshold=0.6))
    assert names(out) == ALWAYS | {"index.html"} | {f"mask_th0.6_{name}.png" for name in NAMES}
    np.testing.assert_array_equal(pixels(out / "img.png"), pixels(source))
    for name in names(out) - {"sheet.png", "index.html", "attention.json"}:
        assert pixels(out / name).shape == (37, 52, 3), name
    said = capsys.readouterr().out
    assert f"{ARCH}: random weights, a baseline" in said
    assert f"Drew 1 picture into {out}; open {out / 'index.html'}" in said


def test_files_hold_the_attention_of_the_weights_that_were_given(tmp_path: Path, weights):
    backbone, file = weights
    source = save_picture(tmp_path / "a.png", 32, 48)
    (maps,) = attention_maps(backbone, pixels(source)[None])
    out = tmp_path / "out"
    drawn = {"pretrained_weights": file, "colormap": "viridis", "threshold": 0.5, "percentiles": (0.0, 100.0)}
    run(options(source, out, **drawn, npz=True))
    for head, values in enumerate(maps):
        expected = heat(enlarge(normalize(values), 16, (32, 48)), "viridis")
        np.testing.assert_array_equal(pixels(out / f"attn-head{head}.png"), expected)
        kept = enlarge(mass_mask(values, 0.5), 16, (32, 48)) > 0
        darker = pixels(out / f"mask_th0.5_head{head}.png").sum(axis=-1) < pixels(source).sum(axis=-1)
        assert darker[~kept].all()
    for name, values in (("mean", maps.mean(axis=0)), ("max", maps.max(axis=0))):
        expected = heat(enlarge(normalize(values), 16, (32, 48)), "viridis")
        np.testing.assert_array_equal(pixels(out / f"attn-{name}.png"), expected)
    with np.load(out / "maps.npz") as arrays:
        np.testing.assert_allclose(arrays["attention"], maps, rtol=1e-6)
        assert (int(arrays["patch_size"]), arrays["image_size"].tolist()) == (16, [32, 48])


def test_scale_and_block_are_those_that_were_asked_for(tmp_path: Path, weights):
    backbone, file = weights
    source = save_picture(tmp_path / "a.png", 64, 96)
    (maps,) = attention_maps(backbone, pixels(source)[None], block=0)
    out = tmp_path / "out"
    run(options(source, out, pretrained_weights=file, block=0, scale=(0.5, 1.5), heads="2"))
    assert {name for name in names(out) if name.startswith("attn-")} == {"attn-head2.png"}
    expected = heat(enlarge(normalize(maps[2], limits=(0.5 / 24, 1.5 / 24)), 16, (64, 96)))
    np.testing.assert_array_equal(pixels(out / "attn-head2.png"), expected)


def test_the_record_says_what_was_drawn_with_what(tmp_path: Path, weights):
    source = save_picture(tmp_path / "a.png")
    run(options(source, tmp_path / "out", pretrained_weights=weights[1], heads="1"))
    record = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert set(record["files"]) == {"img.png", "sheet.png", "attn-head1.png"}
    assert (record["arch"], record["patch_size"], record["block"]) == (ARCH, 16, -1)
    assert record["input"] == str(source) and len(record["weights_sha256"]) == 64
    assert {"command", "date", "versions"} <= record.keys()


def test_the_command_line_takes_dinos_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = save_picture(tmp_path / "a.png")
    line = (
        f"x --arch vit_tiny --patch_size 16 --image_path {source} --image_size 32 64 --output_dir {tmp_path}"
    )
    line += " --threshold 0.6 --checkpoint_key teacher --smooth true --device cpu --pretrained_weights random"
    monkeypatch.setattr(sys, "argv", line.split())
    main()
    assert pixels(tmp_path / "attn-head2.png").shape == (32, 64, 3)
    assert {"mask_th0.6_head0.png", "img.png"} <= names(tmp_path)


def test_pictures_for_a_vit_have_dinos_size_unless_another_is_asked_for(tmp_path: Path, capsys):
    source = save_picture(tmp_path / "a.png")
    vit = {"arch": "vit_tiny", "patch_size": 16, "heads": "0"}
    run(options(source, tmp_path / "dino", **vit))
    assert pixels(tmp_path / "dino" / "img.png").shape == (480, 480, 3)
    assert (
        "pictures are resized to 480 rows and 480 columns of pixels, as by DINO's script"
        in capsys.readouterr().out
    )
    for size, expected, said in (
        ((0,), (37, 52), ""),
        ((30,), (30, 42), "pictures are resized to a short side of 30 pixels\n"),
        ((16, 40), (16, 40), "pictures are resized to 16 rows and 40 columns of pixels\n"),
    ):
        run(options(source, tmp_path / "own", **vit, image_size=size))
        assert pixels(tmp_path / "own" / "img.png").shape[:2] == expected
        out = capsys.readouterr().out
        assert said in out and ("resized" in out) == bool(said)


def test_a_folder_keeps_its_tree_and_skips_what_is_broken(tmp_path: Path, capsys):
    source, out = tmp_path / "in", tmp_path / "in" / "out"
    save_picture(source / "a.png")
    save_picture(source / "deep" / "b.jpg")
    (source / "broken.png").write_bytes(b"")
    (source / "broken.mp4").write_bytes(b"")
    (source / "notes.txt").write_text("no picture")
    run(options(source, out))
    assert names(out) == {"a", "deep", "index.html"}
    assert names(out / "deep" / "b") == names(out / "a") == ALWAYS
    said = capsys.readouterr().out
    assert f"skipped: {source / 'broken.png'}: empty file" in said and "broken.mp4" in said
    assert "Drew 2 pictures of 4 inputs" in said
    page = (out / "index.html").read_text()
    assert "deep/b" in page and "broken" not in page


def test_heads_are_picked_without_labels_and_it_is_said_how(tmp_path: Path, capsys):
    source = tmp_path / "in"
    for index in range(3):
        save_picture(source / f"{index}.png", 48 + 16 * index, 64)
    run(options(source, tmp_path / "out", heads="auto", pca=True, gallery=False))
    assert "heads picked without labels" in capsys.readouterr().out
    drawn = names(tmp_path / "out" / "0")
    assert "pca.png" in drawn and "attn-mean.png" not in drawn
    assert 1 <= len([name for name in drawn if name.startswith("attn-head")]) <= 3
    assert not (tmp_path / "out" / "index.html").exists()


def test_the_page_begins_with_the_heads_and_the_scale_that_were_asked_for(tmp_path: Path):
    source = save_picture(tmp_path / "a.png")
    run(options(source, tmp_path / "some", heads="3,1", percentiles=(2.0, 90.0)))
    run(options(source, tmp_path / "all", scale=(0.0, 5.0), heads="mean"))
    some, all_heads = ((tmp_path / name / "index.html").read_text() for name in ("some", "all"))
    assert 'data-on="3,1"' in some and '"percentiles": [2.0, 90.0], "even": null' in some
    assert 'data-on="0,1,2,3"' in all_heads and '"even": [0.0, 5.0]' in all_heads
    assert 'href="attn-head3.png"' in some and "attn-head0" not in some


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_a_url_is_fetched(tmp_path: Path):
    save_picture(tmp_path / "served" / "my picture.png")
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/my%20picture.png"
        run(options(url, tmp_path / "out", heads="mean"))
        np.testing.assert_array_equal(
            pixels(tmp_path / "out" / "img.png"), pixels(tmp_path / "served" / "my picture.png")
        )
        gone = url.replace("my%20picture", "gone")
        with pytest.raises(UserError, match=r"cannot download .*/gone.png: .*404"):
            run(options(gone, tmp_path / "out"))
        run(options(url, tmp_path / "two", heads="auto", input=(gone, url)))
        assert (tmp_path / "two" / "my picture" / "img.png").exists()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"input": ()}, "--input is missing"),
        ({"input": ("nowhere/b.png",)}, "nowhere/b.png: no such file or folder"),
        (
            {"input": (), "image_path": ("*.jpg",)},
            "--image_path *.jpg: no pictures or videos fit this pattern",
        ),
        ({"input": ("text.png",)}, "text.png: not a picture that Pillow can read"),
        ({"input": ("text.png", "zero.png")}, "can read; nor can the other one be drawn"),
        ({"input": ("text.png", "zero.png", "text.png")}, "; nor can the 2 others be drawn"),
        (
            {"input": ("img.png",), "output_dir": "."},
            "img.png would be overwritten by an output of the same name",
        ),
        ({"input": ("~nobody-of-that-name/a.png",)}, "there is no such user, whose home ~ would be"),
        ({"output_dir": "~nobody-of-that-name"}, "--output_dir ~nobody-of-that-name: there is no such user"),
        ({"input": ("x" * 300,)}, "--input: cannot read " + "x" * 300 + ": File name too long"),
        (
            {"image_size": (9_000_000,)},
            "a.png: a picture of 52 x 37 pixels resized to 12648648 x 9000000 would",
        ),
        (
            {"draw": ("colors",), "heads": "mean,max"},
            "--draw colors gives every single head a colour of its own",
        ),
        ({"output_dir": "text.png"}, "cannot write into --output_dir text.png: File exists; name another"),
        ({"colormap": "infernoo"}, "did you mean inferno"),
        ({"threshold": 60.0}, "--threshold is a part, between 0 and 1, got 60.0"),
        ({"opacity": -1.0}, "--opacity is a part, between 0 and 1, got -1.0"),
        ({"image_size": (0, 3)}, "--image_size takes one or two numbers of pixels, at least 1, got 0 3"),
        ({"image_size": (1, 2, 3)}, "at least 1, got 1 2 3"),
        ({"image_size": (8,), "resize": (8,)}, "--image_size and --resize are two names of one option"),
        ({"draw": ("heat", "oil")}, "--draw oil: there are heat, overlay"),
        ({"percentiles": (99.0,)}, "--percentiles takes a low and a higher number between 0 and 100, got 99"),
        ({"percentiles": (5.0, 101.0)}, "between 0 and 100, got 5 101"),
        ({"scale": (3.0, 1.0)}, "--scale takes a low and a higher number, got 3 1"),
        ({"similar_to": (4,)}, "--similar_to takes x and y in pixels, got 4"),
        ({"similar_to": (500, 2)}, "a.png: the point 500 2 lies outside of the picture of 52 x 37 pixels"),
        ({"heads": "4"}, "--heads 4: this model has heads 0 to 3"),
        ({"heads": "first"}, "'first' is none of"),
        ({"block": 2}, "--block 2: this model has 2 blocks"),
        ({"stride": 0}, "--stride must be 1 or more, got 0"),
        ({"fps": 0.0}, "--fps must be more than 0"),
        ({"tile": 7, "input": ("a.png",)}, "a tile holds at least one patch of 16 pixels"),
        ({"arch": "vit_tiny", "tile": 64}, "--tile is for XCiT, whose tokens are computed locally"),
        ({"arch": "resnet18"}, "there is no class attention to draw in ResNet: --arch takes XCiT's names"),
        ({"arch": "xcit_nano"}, "unknown model 'xcit_nano'"),
        ({"pretrained_weights": "gone.pth"}, "gone.pth"),
        ({"pretrained_weights": ""}, f"there are no published DINO weights of {ARCH}"),
        (
            {"video_only": True},
            "--video_only makes a video of the folder of pictures that --input_path names",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_file(tmp_path: Path, monkeypatch, wrong, sentence):
    monkeypatch.chdir(tmp_path)
    save_picture(Path("a.png"))
    Path("text.png").write_text("no picture")
    Path("zero.png").touch()
    Path("img.png").touch()
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        run(options("a.png", **{"output_dir": "out", **wrong}))
    assert "\n" not in str(caught.value)
    assert not [file for file in tmp_path.glob("out/**/*") if file.is_file()]


def test_help_needs_no_torch():
    code = "import sys, dino.attention.visualize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
