"""The benchmark of attention videos on clips of a second."""

import json
from fractions import Fraction

import pytest

from benchmarks.attention_video import FilmingOptions, _make_clip, measure
from dino.runtime.options import UserError
from dino.video.video_file import VideoFile


@pytest.mark.slow
def test_it_reports_rate_stages_and_memory(tmp_path, capsys):
    clip, report = tmp_path / "clip.mp4", tmp_path / "report.json"
    _make_clip(clip, (48, 64), 1)
    options = FilmingOptions(
        video=str(clip),
        arch="xcit_nano_12_p16",
        layouts=("grid",),
        device="cpu",
        lengths=(1,),
        output=str(report),
    )
    measure(options)
    numbers = json.loads(report.read_text())
    assert {"date", "command", "machine", "device", "versions", "options"} <= numbers.keys()
    for measured in (numbers["speed"]["grid"], numbers["memory"]["1 s"]):
        assert measured["frames"] == 25 and measured["seconds_of_video"] == pytest.approx(1)
        assert measured["ms_per_frame"].keys() == {"decode", "model", "render", "encode"}
        assert min(measured["ms_per_frame"].values()) > 0 and measured["frames_per_second"] > 0
        assert 0.1 < measured["peak_resident_gb"] < 5
    assert "xcit_nano_12_p16, clip.mp4, grid: 25 frames" in capsys.readouterr().out


def test_a_made_up_clip_has_the_length_that_was_asked_for(tmp_path):
    _make_clip(tmp_path / "clip.mp4", (33, 40), 2)
    with VideoFile(tmp_path / "clip.mp4") as source:
        frames = list(source)
    assert len(frames) == 50 and frames[-1].time + frames[-1].duration == Fraction(2)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match="--layouts are of overlay, side-by-side, grid, separate"):
        measure(FilmingOptions(layouts=("spiral",)))
    with pytest.raises(UserError, match="--lengths are 1 or more"):
        measure(FilmingOptions(lengths=(0,)))
