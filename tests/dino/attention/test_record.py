"""What the outputs are called, and that later runs know them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dino.attention.drawing import STYLES, Look, Picture
from dino.attention.picture_outputs import PictureOutputs
from dino.attention.record import RECORD, is_output_name, recorded_files, write_record
from dino.attention.video_outputs import plan_films
from dino.attention.visualize_options import LAYOUTS
from dino.video.writer import FORMATS

MAPS = np.ones((3, 2, 2), np.float32)
LAYERS = {"mean": MAPS[0], "max": MAPS[1], "head12": MAPS[2]}


@pytest.mark.parametrize("threshold", [0.6, 1.0, 1e-05])
def test_every_output_of_a_picture_is_called_like_one(tmp_path: Path, threshold: float):
    features = {"similarity": MAPS[0], "pca": np.zeros((2, 2, 3), np.uint8)}
    picture = Picture(np.zeros((16, 16, 3), np.uint8), LAYERS, LAYERS, features)
    written = PictureOutputs(Look(8, threshold=threshold), STYLES, npz=True).write(
        tmp_path, "", picture, MAPS
    )
    assert sorted(written) == sorted(file.name for file in tmp_path.iterdir())
    assert [name for name in written if not is_output_name(name)] == [] and len(written) > 15


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("video_format", FORMATS)
@pytest.mark.parametrize("styles", [(), ("heat",), ("heat", "colors"), STYLES])
def test_every_output_of_a_video_is_called_like_one(layout: str, video_format: str, styles: tuple[str, ...]):
    films = plan_films(
        [*LAYERS, "similarity", "pca"],
        SimpleNamespace(size=(16, 16)),
        Path("out"),
        layout=layout,
        styles=styles,
        masks=True,
        longest=0,
        video_format=video_format,
        look=Look(8),
    )
    assert films and all(is_output_name(film.path.name) for film in films)


@pytest.mark.parametrize(
    "name",
    ["photo.png", "img.jpg", "images.png", "attn.png", "video-2019.mp4", "myvideo.mp4", "maps.png", "a"],
)
def test_files_of_other_names_are_not_taken_for_outputs(name: str):
    assert not is_output_name(name)


def test_outputs_of_earlier_runs_are_remembered_while_they_exist(tmp_path: Path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    write_record(tmp_path, "x", ["a.png", "b.png", "gone.png"], {"arch": "one"})
    write_record(tmp_path, "x", ["c.png"], {"arch": "two"})
    write_record(tmp_path, "x", ["c.png", "a.png"], {"arch": "three"})
    record = json.loads((tmp_path / RECORD).read_text())
    assert (record["files"], record["earlier_files"], record["arch"]) == (
        ["c.png", "a.png"],
        ["b.png"],
        "three",
    )
    assert recorded_files(tmp_path) == {"a.png", "b.png", "c.png"}


def test_a_name_that_is_no_text_is_kept(tmp_path: Path):
    write_record(tmp_path, "caf\udce9 ü.png", [], {})
    assert json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))["input"] == "caf\udce9 ü.png"
    assert "ü" in (tmp_path / RECORD).read_text(encoding="utf-8")
