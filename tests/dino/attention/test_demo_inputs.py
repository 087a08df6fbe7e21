"""The embedded pictures and clip."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
from PIL import Image

from dino.attention.demo_inputs import write_demo_inputs
from dino.video.video_file import VideoFile


def test_pictures_and_a_clip_in_which_something_moves_are_written(tmp_path):
    write_demo_inputs(tmp_path / "demo")
    pictures = sorted((tmp_path / "demo").glob("*.png"))
    assert len(pictures) == 4
    with Image.open(pictures[0]) as first:
        assert first.size == (288, 288)
    with VideoFile(tmp_path / "demo" / "clip.mp4") as source:
        frames = list(source)
    assert len(frames) == 60 and float(frames[-1].time + frames[-1].duration) == 4.8
    steps = [np.abs(one.pixels.astype(int) - other.pixels).mean() for one, other in pairwise(frames)]
    assert min(steps) > 0.2 and max(steps) < 15, "it moves, and nothing jumps"


def test_the_same_frames_are_made_every_time(tmp_path):
    for name in "ab":
        write_demo_inputs(tmp_path / name)
    for file in (tmp_path / "a").glob("*.png"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    clips = [VideoFile(tmp_path / name / "clip.mp4") for name in "ab"]
    for one, other in zip(*clips, strict=True):
        # x264 does not code the same frames alike every time.
        assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 1


def test_the_module_is_there_at_once():
    """It comes with the command, whose --help answers at once; what draws the pictures takes seconds to import."""
    code = (
        "import sys, dino.attention.demo_inputs; sys.exit('sklearn' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
