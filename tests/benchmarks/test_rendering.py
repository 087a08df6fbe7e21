"""The benchmark of drawing maps, on a small picture."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.rendering import RenderingOptions, color_by_matplotlib, measure, write, write_like_dino
from dino.attention.render import heat_patches, normalize
from dino.runtime.options import UserError

SMALL = RenderingOptions(size=(40, 56), patch_sizes=(8,), heads=2, turns=3)


def test_it_reports_both_ways_and_every_mark(tmp_path, capsys):
    report = tmp_path / "report.json"
    measure(RenderingOptions(**{**vars(SMALL), "output": str(report)}))
    numbers = json.loads(report.read_text())
    assert {"date", "command", "machine", "versions", "size", "heads"} <= numbers.keys()
    files, colours = numbers["patch 8"]["png_files"], numbers["patch 8"]["colours"]
    for way in (files, colours):
        assert way["theirs"] > 0 and way["ratio"] == pytest.approx(way["theirs"] / way["ours"])
        assert way["lowest"] <= way["highest"] and way["processor_ratio"] > 0
    assert files["difference"] <= 3, "the two ways are to draw the same"
    assert all(milliseconds > 0 for milliseconds in numbers["patch 8"]["marks_ms"].values())
    assert "40 x 56 pixels, patches of 8, 2 heads and their mean" in capsys.readouterr().out


def test_both_ways_draw_every_head_and_the_mean(tmp_path):
    maps = np.random.default_rng(0).random((3, 4, 5), dtype=np.float32)
    (tmp_path / "theirs").mkdir(), (tmp_path / "ours").mkdir()
    write_like_dino(maps, 8, tmp_path / "theirs")
    write(maps, 8, (32, 40), tmp_path / "ours")
    for index, values in enumerate([*maps, maps.mean(axis=0)]):
        expected = heat_patches(normalize(values), 8, (32, 40), colormap="viridis").astype(int)
        for folder in ("theirs", "ours"):
            with Image.open(tmp_path / folder / f"{index}.png") as image:
                assert np.abs(np.asarray(image.convert("RGB")) - expected).max() <= 3
        assert np.abs(color_by_matplotlib(maps, 8)[index][..., :3] - expected).max() <= 3


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="--size, --patch_sizes, --heads and --turns must be 1 or more"):
        measure(RenderingOptions(turns=0))
    with pytest.raises(UserError, match=r"cannot write into --output /proc/nowhere"):
        measure(RenderingOptions(output="/proc/nowhere/report.json"))
