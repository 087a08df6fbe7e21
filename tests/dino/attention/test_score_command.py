"""The command: what it reads and writes, its means, and what it says to mistakes."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.attention.jaccard import jaccard
from dino.attention.maps import attention_maps
from dino.attention.score import main, run
from dino.attention.score_options import ScoreOptions, check
from dino.attention.score_table import PictureScore, as_text, best_single, means
from dino.runtime.backbones import create_backbone
from dino.runtime.options import UserError

ARCH = "xcit_nano_12_p16"
SIZES = [(40, 64), (64, 48), (33, 50)]


def mask_of(number: int, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[number : size[0] // 2, : size[1] // 2] = 1
    mask[size[0] // 2 :, size[1] // 3 :] = 2
    mask[-3:] = 255
    return mask


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels(number)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(mask_of(number, size)).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SIZES[number], 3), np.uint8)


def options(data: Path, **others: object) -> ScoreOptions:
    given = {
        "images": str(data / "images"),
        "masks": str(data / "masks"),
        "arch": ARCH,
        "pretrained_weights": "random",
        "device": "cpu",
        "precision": "fp32",
        "output_dir": str(data / "out"),
        **others,
    }
    return ScoreOptions(**given)


def written(data: Path) -> tuple[dict, list[dict[str, str]]]:
    with (data / "out" / "score.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((data / "out" / "score.json").read_text()), rows


def test_both_files_hold_the_paper_s_protocol(data: Path, capsys: pytest.CaptureFixture[str]):
    import torch

    run(options(data))
    torch.manual_seed(0)
    backbone = create_backbone(ARCH).eval()
    best, of_heads = [], []
    for number, size in enumerate(SIZES):
        (maps,) = attention_maps(backbone, pixels(number)[None])
        mask = mask_of(number, size)
        each = [jaccard(maps, mask == value, 16, keep=0.6, ignore=mask == 255) for value in (1, 2)]
        of_heads.append(np.mean(each, axis=0))
        best.append(np.mean([values.max() for values in each]))
    result, rows = written(data)
    found = result["jaccard"]
    assert [row["picture"] for row in rows] == ["0.png", "1.png", "2.png"]
    np.testing.assert_allclose([float(row["best_head"]) for row in rows], best, atol=1e-6)
    assert found["best_head"]["jaccard"] == pytest.approx(np.mean(best))
    assert found["best_head"]["standard_error"] == pytest.approx(np.std(best, ddof=1) / 3**0.5)
    heads = [found[f"head{head}"]["jaccard"] for head in range(4)]
    np.testing.assert_allclose(heads, np.mean(of_heads, axis=0))
    assert result["best_single_head"] == f"head{int(np.argmax(heads))}"
    assert {"mean", "max", "auto", "whole_picture", "centred_disc"} <= found.keys()
    assert (result["pictures"], result["objects"], result["options"]["threshold"]) == (3, 6, 0.6)
    assert {"command", "date", "versions", "tensors_sha256"} <= result.keys() and result["left_out"] == []
    said = capsys.readouterr().out
    assert "3 pictures, 6 masks" in said and f"{100 * np.mean(best):5.1f} ±" in said
    assert "heads picked without labels" in said and "chance: a centred disc" in said


def test_the_command_line_scores_what_it_names(data: Path, monkeypatch: pytest.MonkeyPatch):
    line = f"x --images {data}/images --masks {data}/masks --arch vit_tiny --pretrained_weights random"
    line += " --heads 2,0 --objects union --image_size 32 48 --threshold 0.5 --max_pictures 2 --device cpu"
    monkeypatch.setattr(sys, "argv", f"{line} --output_dir {data}/out".split())
    main()
    result, rows = written(data)
    assert [row["picture"] for row in rows] == ["0.png", "2.png"] and result["objects"] == 2
    maps = {name for name in result["jaccard"] if name.startswith(("head", "mean", "max"))}
    assert maps == {"mean", "head2", "head0"}
    assert "0.5 of the attention with all objects of a picture as one" in result["protocol"]


def test_a_file_that_cannot_be_used_is_named_and_left_out(data: Path, capsys):
    for name, content in (("3.png", b"no picture"), ("4.png", b"")):
        (data / "images" / name).write_bytes(content)
        Image.fromarray(mask_of(0, (8, 8))).save(data / "masks" / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels(0)).save(data / "images" / "5.jpg", exif=turned)
    Image.fromarray(mask_of(0, SIZES[0])).save(data / "masks" / "5.png")
    Image.fromarray(np.zeros((40, 64), np.uint8)).save(data / "masks" / "0.png")
    run(options(data, image_size=(32,)))
    result, rows = written(data)
    assert [row["picture"] for row in rows] == ["1.png", "2.png"]
    assert result["left_out"] == [
        "0.png: no object in it",
        "3.png: not a picture that Pillow can read",
        "4.png: empty file",
        "5.jpg: the mask is 64 x 40 pixels, the upright picture 40 x 64",
    ]
    assert "left out: 4.png: empty file\n" in capsys.readouterr().out


def test_of_many_left_out_the_first_are_said(data: Path, capsys):
    for number in range(10, 18):
        (data / "images" / f"{number}.png").write_bytes(b"")
        Image.fromarray(mask_of(0, (8, 8))).save(data / "masks" / f"{number}.png")
    run(options(data))
    said = capsys.readouterr().out
    assert said.count("empty file") == 5 and "left out: 3 more, all named in score.json" in said
    assert len(written(data)[0]["left_out"]) == 8


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"images": ""}, "--images is missing"),
        ({"masks": ""}, "--masks is missing"),
        ({"masks": "gone"}, "--masks gone: neither a folder of mask files nor a COCO file"),
        ({"threshold": 0.0}, "--threshold is a part of the attention, above 0 and up to 1, got 0"),
        ({"threshold": 60.0}, "above 0 and up to 1, got 60"),
        ({"max_pictures": -1}, "--max_pictures must be 0 (all) or more, got -1"),
        ({"void": 0}, "--void 0: 0 is the background"),
        ({"image_size": (0,)}, "at least 1, got 0"),
        ({"image_size": (1, 2, 3)}, "one or two numbers of pixels, at least 1, got 1 2 3"),
        ({"heads": "4"}, "--heads 4: this model has heads 0 to 3"),
        ({"heads": "best"}, "'best' is none of all, mean, max, auto"),
        ({"block": 7}, "--block 7"),
        ({"arch": "resnet18"}, "no class attention to draw in ResNet"),
        ({"pretrained_weights": "gone.pth"}, "gone.pth"),
        ({"output_dir": "text.txt"}, "cannot write into --output_dir text.txt"),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_file(data: Path, monkeypatch, wrong: dict, sentence: str):
    monkeypatch.chdir(data)
    Path("text.txt").write_text("")
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        run(options(data, **wrong))
    assert "\n" not in str(caught.value)
    assert not list(Path().glob("**/score.*"))


@pytest.mark.parametrize(("given", "size"), [((), None), ((32,), 32), ((32, 48), (32, 48))])
def test_the_size_is_the_short_side_or_rows_and_columns(data: Path, given: tuple, size: object):
    assert check(options(data, image_size=given)) == size


def test_nothing_but_unusable_pictures_is_a_mistake(data: Path):
    for file in (data / "masks").iterdir():
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(file)
    with pytest.raises(UserError, match=r"no picture could be scored: 0\.png: the mask is 8 x 8"):
        run(options(data))
    for file in (data / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 pictures .* can be read: 0\.png: empty file"):
        run(options(data))


def test_the_mean_is_of_the_heads_that_are_listed_below_it():
    chance = {"whole picture": 0.1, "centred disc": 0.2}
    some = as_text(means([PictureScore("a", 1, {"mean": 0.5, "max": 0.4, "head3": 0.3, **chance})]), (1,))
    assert re.findall(r"(?:mean|maximum) of (?:all heads|the heads below)", some) == [
        "mean of the heads below",
        "maximum of the heads below",
    ]
    assert some.index("the heads below") < some.index("  head 3")
    assert "mean of all heads" in as_text(means([PictureScore("a", 1, {"mean": 0.5, **chance})]), (1,))


def test_a_single_picture_has_no_standard_error():
    table = means([PictureScore("a", 1, {"mean": 0.5, "whole picture": 0.1, "centred disc": 0.2})])
    assert table["mean"].plain() == {"jaccard": 0.5, "standard_error": None}
    assert best_single(table) is None
    assert "±" not in as_text(table, (1,)) and "50.0" in as_text(table, (1,))


def test_coco_annotations_of_real_pictures_are_scored(data: Path, shared_data: Path):
    pytest.importorskip("pycocotools")
    folder = shared_data / "coco-small"
    masks = str(folder / "annotations_val.json")
    run(options(data, images=str(folder / "images"), masks=masks, image_size=(64,), max_pictures=4))
    result, rows = written(data)
    assert len(rows) == 4 and result["objects"] == sum(int(row["objects"]) for row in rows) >= 4
    assert all(0 <= float(value) <= 1 for row in rows for value in list(row.values())[2:])


def test_help_needs_no_torch():
    code = "import sys, dino.attention.score; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
