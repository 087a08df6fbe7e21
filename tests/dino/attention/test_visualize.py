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
from PIL import Image

from dino.attention.maps import attention_maps
from dino.attention.render import enlarge, heat, mass_mask, normalize
from dino.attention.visualize import main, run
from dino.attention.visualize_options import VisualizeOptions
from dino.runtime.backbones import create_backbone
from dino.runtime.options import UserError

ARCH = "xcit_nano_12_p16"
HEADS = 4
NAMES = ("mean", "max", *(f"head{head}" for head in range(HEADS)))
ALWAYS = {"img.png", "sheet.png", "attention.json", *(f"attn-{name}.png" for name in NAMES)}


def save_picture(path: Path, rows: int = 37, cols: int = 52) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(rows).integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def options(picture: Path | str, output_dir: Path, **others: object) -> VisualizeOptions:
    given = {
        "arch": ARCH,
        "pretrained_weights": "random",
        "input": (str(picture),),
        "output_dir": str(output_dir),
        "device": "cpu",
        "precision": "fp32",
    }
    return VisualizeOptions(**{**given, **others})


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
    assert "pictures are resized to 480 x 480" in capsys.readouterr().out
    for size, expected in (((0,), (37, 52)), ((30,), (30, 42)), ((16, 40), (16, 40))):
        run(options(source, tmp_path / "own", **vit, image_size=size))
        assert pixels(tmp_path / "own" / "img.png").shape[:2] == expected
    assert "resized" not in capsys.readouterr().out


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
    assert f"skipped {source / 'broken.png'}: empty file" in said and "broken.mp4" in said
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


def test_large_pictures_are_tiled_on_request(tmp_path: Path):
    source = save_picture(tmp_path / "a.png", 80, 400)
    for tile in (0, 96):
        run(options(source, tmp_path / str(tile), tile=tile, npz=True))
    whole, tiled = (np.load(tmp_path / str(tile) / "maps.npz")["attention"] for tile in (0, 96))
    assert whole.shape == tiled.shape == (HEADS, 5, 25)
    assert (whole != tiled).any()


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
        with pytest.raises(UserError, match=r"cannot download .*/gone.png: .*404"):
            run(options(url.replace("my%20picture", "gone"), tmp_path / "out"))
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
        ({"input": ("text.png", "zero.png")}, "nor can the 1 others"),
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
        ({"similar_to": (500, 2)}, "row 2, column 500 lies outside"),
        ({"heads": "4"}, "--heads 4: this model has heads 0 to 3"),
        ({"heads": "first"}, "'first' is none of"),
        ({"block": 2}, "--block 2: this model has 2 blocks"),
        ({"stride": 0}, "--stride must be 1 or more, got 0"),
        ({"fps": 0.0}, "--fps must be more than 0"),
        ({"tile": 7, "input": ("a.png",)}, "a tile holds at least one patch of 16 pixels"),
        ({"arch": "resnet18"}, "ResNet has no class attention to draw; XCiT and vision transformers"),
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
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        run(options("a.png", **{"output_dir": "out", **wrong}))
    assert "\n" not in str(caught.value)
    assert not [file for file in tmp_path.glob("out/**/*") if file.is_file()]


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
    skipped = {Path(line.split(": ")[0]).name for line in said.splitlines() if line.startswith("skipped")}
    assert skipped == _BROKEN
    pictures = [file for file in odd.iterdir() if file.name not in _BROKEN]
    assert f"Drew {len(pictures)} pictures" in said
    assert len(list(tmp_path.glob("**/attn-mean.png"))) == len(pictures)
    assert pixels(tmp_path / "exif6_landscape" / "img.png").shape == (64, 96, 3)
    assert pixels(tmp_path / "giant_20000x14000_gray" / "img.png").shape == (64, 91, 3)
    for name, shape in (("derived_1x1.png", (1, 1)), ("derived_strip_1072x10.jpg", (10, 1072))):
        run(options(odd / name, tmp_path / "own", heads="mean"))
        assert pixels(tmp_path / "own" / "attn-mean.png").shape == (*shape, 3)


def test_help_needs_no_torch():
    code = "import sys, dino.attention.visualize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
