"""The command: which files it reads, which it writes, and what it says to mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.attention.render import enlarge, heat, mass_mask, normalize
from dino.attention.visualize import VisualizeOptions, find_pictures, main, run
from dino.runtime.options import UserError

ARCH = "xcit_nano_12_p16"
HEADS = 4
ALWAYS = {"img.png", "attn-mean.png", "sheet.png", *(f"attn-head{head}.png" for head in range(HEADS))}
ODD = Path(__file__).parents[3].parent / "shared" / "data" / "images-odd"


def save_picture(path: Path, rows: int = 37, cols: int = 52) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(rows).integers(0, 256, (rows, cols, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def options(image_path: Path | str, output_dir: Path, **others: object) -> VisualizeOptions:
    return VisualizeOptions(
        arch=ARCH,
        image_path=str(image_path),
        output_dir=str(output_dir),
        device="cpu",
        precision="fp32",
        **others,
    )


def test_one_picture_gives_the_files_of_dinos_script_at_the_pictures_size(tmp_path: Path, capsys):
    source = save_picture(tmp_path / "a.png")
    out = tmp_path / "new" / "out"
    run(options(source, out, threshold=0.6))
    assert names(out) == ALWAYS | {f"mask_th0.6_head{head}.png" for head in range(HEADS)}
    np.testing.assert_array_equal(pixels(out / "img.png"), pixels(source))
    for name in names(out) - {"sheet.png"}:
        assert pixels(out / name).shape == (37, 52, 3), name
    assert "this network is random" in capsys.readouterr().out


def test_files_hold_the_attention_of_the_weights_that_were_given(tmp_path: Path):
    import torch

    from dino.attention.maps import attention_maps
    from dino.runtime.backbones import create_backbone

    source = save_picture(tmp_path / "a.png", 32, 48)
    backbone = create_backbone(ARCH)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    maps = attention_maps(backbone, pixels(source))
    out = tmp_path / "out"
    weights = str(tmp_path / "weights.pth")
    run(options(source, out, pretrained_weights=weights, colormap="viridis", threshold=0.5))
    for head, values in enumerate(maps):
        expected = heat(enlarge(normalize(values), 16, (32, 48)), "viridis")
        np.testing.assert_array_equal(pixels(out / f"attn-head{head}.png"), expected)
        kept = enlarge(mass_mask(values, 0.5), 16, (32, 48)) > 0
        darker = pixels(out / f"mask_th0.5_head{head}.png").sum(axis=-1) < pixels(source).sum(axis=-1)
        assert darker[~kept].all()
    expected = heat(enlarge(normalize(maps.mean(axis=0)), 16, (32, 48)), "viridis")
    np.testing.assert_array_equal(pixels(out / "attn-mean.png"), expected)


def test_the_command_line_takes_dinos_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = save_picture(tmp_path / "a.png")
    line = (
        f"x --arch vit_tiny --patch_size 16 --image_path {source} --image_size 32 64 --output_dir {tmp_path}"
    )
    line += " --threshold 0.6 --checkpoint_key teacher --smooth true --device cpu"
    monkeypatch.setattr(sys, "argv", line.split())
    main()
    assert pixels(tmp_path / "attn-head2.png").shape == (32, 64, 3)
    assert {"mask_th0.6_head0.png", "img.png"} <= names(tmp_path)


def test_a_folder_keeps_its_tree_and_skips_what_is_broken(tmp_path: Path, capsys):
    source, out = tmp_path / "in", tmp_path / "in" / "out"
    save_picture(source / "a.png")
    save_picture(source / "deep" / "b.jpg")
    (source / "broken.png").write_bytes(b"")
    (source / "notes.txt").write_text("no picture")
    run(options(source, out))
    assert names(out) == {"a", "deep"} and names(out / "deep" / "b") == names(out / "a") == ALWAYS
    said = capsys.readouterr().out
    assert f"skipped {source / 'broken.png'}: empty file" in said and "Drew 2 of 3 pictures" in said


def test_a_pattern_finds_files_and_pictures_of_one_stem_do_not_overwrite_each_other(tmp_path: Path):
    for name in ("x/a.png", "x/a.jpg", "y/b.png", "y/c.png"):
        save_picture(tmp_path / name)
    out = tmp_path / "out"
    found = find_pictures(f"{tmp_path}/*/[ab].*", out)
    expected = {"x/a.jpg": "x/a.jpg", "x/a.png": "x/a.png", "y/b.png": "y/b"}
    assert found == [(tmp_path / file, out / folder) for file, folder in expected.items()]


@pytest.mark.parametrize("pattern", ["**.png", "*", "{a,b}.png", "**/*.*"])
def test_a_pattern_takes_visible_pictures_only(tmp_path: Path, pattern: str):
    for name in ("a.png", "b.png", "._a.png"):
        save_picture(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [file.name for file, _ in find_pictures(f"{tmp_path}/{pattern}", tmp_path / "out")] == [
        "a.png",
        "b.png",
    ]
    assert [file.name for file, _ in find_pictures(f"{tmp_path}", tmp_path / "out")] == ["a.png", "b.png"]


@pytest.mark.parametrize("image_path", [".", "**/*.png", "photos"])
def test_a_second_run_draws_what_the_first_one_drew(tmp_path: Path, monkeypatch, image_path: str):
    for name in ("a.png", "img.png", "photos/b.png", "photos/sheet.png"):
        save_picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    first = find_pictures(image_path, Path())
    for folder in [folder for _, folder in first] + [Path("photos/b")]:
        for name in [*ALWAYS, "mask_th0.6_head0.png"]:
            save_picture(folder / name, 2, 2)
    assert find_pictures(image_path, Path()) == first


def test_outputs_beside_a_picture_do_not_hide_it(tmp_path: Path):
    for name in ["a.png", "attn-mean-of-mine.png", *ALWAYS]:
        save_picture(tmp_path / name, 2, 2)
    found = [file.name for file, _ in find_pictures(str(tmp_path), tmp_path)]
    assert found == ["a.png", "attn-mean-of-mine.png"]


def test_what_lies_in_an_output_folder_is_not_drawn_however_it_is_written(tmp_path: Path, monkeypatch):
    for name in ("in/a.png", "in/out/b.png"):
        save_picture(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    for image_path, output_dir in (
        ("in", "link/out"),
        ("link", "in/out"),
        ("in/../in", tmp_path / "in" / "out"),
    ):
        assert [file.name for file, _ in find_pictures(image_path, Path(output_dir))] == ["a.png"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"image_path": ""}, "--image_path is missing"),
        ({"image_path": "nowhere/b.png"}, "nowhere/b.png: no such file or folder"),
        ({"image_path": "*.jpg"}, "*.jpg: no pictures fit this pattern"),
        ({"image_path": "{a,b}.png"}, "b.png, which {a,b}.png stands for, does not exist"),
        ({"image_path": "text.png"}, "text.png: not a picture that Pillow can read"),
        ({"image_path": "empty"}, "no pictures in this folder"),
        ({"output_dir": "text.png"}, "cannot write into --output_dir text.png: File exists; name another"),
        ({"colormap": "infernoo"}, "did you mean inferno"),
        ({"threshold": 60.0}, "between 0 and 1, got 60.0"),
        ({"image_size": (0,)}, "at least 1, got 0"),
        ({"image_size": (1, 2, 3)}, "one or two numbers of pixels, at least 1, got 1 2 3"),
        ({"arch": "resnet18"}, "ResNet has no class attention to draw"),
        ({"arch": "xcit_nano"}, "unknown model 'xcit_nano'"),
        ({"pretrained_weights": "gone.pth"}, "gone.pth"),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_file(tmp_path: Path, monkeypatch, wrong, sentence):
    monkeypatch.chdir(tmp_path)
    save_picture(Path("a.png"))
    Path("text.png").write_text("no picture")
    Path("empty").mkdir()
    given = {"arch": ARCH, "image_path": "a.png", "output_dir": "out", "device": "cpu", **wrong}
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        run(VisualizeOptions(**given))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.skipif(not ODD.is_dir(), reason="the shared test pictures are not here")
def test_odd_pictures_are_drawn_upright_and_whole(tmp_path: Path):
    for name in ("derived_1x1.png", "exif6_landscape.jpg", "derived_strip_1072x10.jpg", "palette_swiss.png"):
        run(options(ODD / name, tmp_path / name, image_size=() if "exif" not in name else (64,)))
    assert pixels(tmp_path / "derived_1x1.png" / "attn-head0.png").shape == (1, 1, 3)
    assert pixels(tmp_path / "derived_strip_1072x10.jpg" / "attn-head0.png").shape == (10, 1072, 3)
    rows, cols, _ = pixels(tmp_path / "exif6_landscape.jpg" / "img.png").shape
    assert rows == 64 < cols


def test_help_needs_no_torch():
    code = "import sys, dino.attention.visualize; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
