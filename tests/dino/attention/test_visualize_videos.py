"""The command for videos: which films it writes, what is in them, and what it says to mistakes."""

import json
import os
import re
import signal
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from dino.attention.layout import Layout
from dino.attention.video_outputs import Resized, samples
from dino.attention.visualize import main, run
from dino.attention.visualize_options import VisualizeOptions
from dino.runtime.options import UserError
from dino.video.clip import Frame
from dino.video.frame_folder import FrameFolder
from dino.video.video_file import VideoFile
from dino.video.writer import VideoWriter
from tests.dino.video.fake_camera import FakeCamera
from tests.dino.video.test_sound import loud, tone

ARCH = "xcit_pico_3_p8"
ROWS, COLS = 40, 64
TIMES = [Fraction(t, 20) for t in (0, 1, 2, 4, 7, 8)]
END = Fraction(9, 20)


def save_clip(path: Path) -> Path:
    """Six frames, the intervals not equal."""
    random = np.random.default_rng(0)
    ground = random.integers(60, 120, (ROWS // 8, COLS // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    with VideoWriter(path, (ROWS, COLS), Fraction(13)) as writer:
        for index, (time, end) in enumerate(zip(TIMES, [*TIMES[1:], END], strict=True)):
            frame = ground.copy()
            frame[8:24, 8 * index : 8 * index + 8] = 250
            writer.write(frame, time, end - time)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def options(video: Path | str, output_dir: Path, **others: object) -> VisualizeOptions:
    given = {
        "arch": ARCH,
        "pretrained_weights": "random",
        "input": (str(video),),
        "output_dir": str(output_dir),
        "device": "cpu",
        "precision": "fp32",
    }
    return VisualizeOptions(**{**given, **others})


def read(path: Path) -> list[Frame]:
    with VideoFile(path) as source:
        return list(source)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("normalize", ["clip", "running", "frame"])
def test_a_video_keeps_its_frames_times_and_size(clip: Path, tmp_path: Path, normalize: str, capsys):
    run(options(clip, tmp_path / "out", normalize=normalize))
    assert names(tmp_path / "out") == {"video.mp4", "index.html", "attention.json"}
    drawn = read(tmp_path / "out" / "video.mp4")
    assert [frame.time for frame in drawn] == TIMES
    assert drawn[-1].time + drawn[-1].duration == END
    assert {frame.pixels.shape for frame in drawn} == {(ROWS, COLS, 3)}
    said = capsys.readouterr().out
    assert re.search(r"clip.mp4: 6 frames, 0.45 s, into video.mp4; .* model \d", said)
    assert json.loads((tmp_path / "out" / "attention.json").read_text())["files"] == ["video.mp4"]
    assert "video.mp4" in (tmp_path / "out" / "index.html").read_text()


def test_each_layout_has_its_films(clip: Path, tmp_path: Path):
    sizes = {}
    for layout in ("overlay", "side-by-side", "grid", "separate"):
        run(options(clip, tmp_path / layout, layout=layout, threshold=0.5, gallery=False))
        films = sorted((tmp_path / layout).glob("*.mp4"))
        sizes[layout] = {film.stem: read(film)[0].pixels.shape[:2] for film in films}
        assert all(len(read(film)) == len(TIMES) for film in films)
    assert sizes["overlay"] == {"video": (ROWS, COLS), "mask_th0.5": (ROWS, COLS)}
    (rows, cols) = sizes["side-by-side"]["video"]
    assert rows == ROWS and 2 * COLS < cols < 2.2 * COLS
    assert sizes["grid"]["video"] == sizes["grid"]["mask_th0.5"] and sizes["grid"]["video"][1] > 3 * COLS
    layers = ("mean", "max", *(f"head{head}" for head in range(4)))
    expected = {f"{stem}-{layer}" for layer in layers for stem in ("video", "mask_th0.5")}
    assert set(sizes["separate"]) == expected


@pytest.mark.parametrize(
    ("heads", "panels"), [("all", 6), ("mean,max", 3), ("1", 2), ("max,0,2", 4), ("mean", 2)]
)
def test_a_grid_shows_the_heads_that_were_asked_for(clip: Path, tmp_path: Path, heads: str, panels: int):
    run(options(clip, tmp_path, layout="grid", heads=heads))
    frame = read(tmp_path / "video.mp4")[0].pixels
    labels = (frame[:, :: COLS // 8].max(axis=-1) > 100).any(axis=1)
    shape = Layout(["x"] * panels, (ROWS, COLS)).size
    assert frame.shape[:2] == tuple(side + side % 2 for side in shape) and labels.any()


def test_a_layout_that_shows_one_map_says_so_where_more_were_asked_for(clip: Path, tmp_path: Path, capsys):
    for heads, sentence in (
        ("0,1", "--layout overlay shows mean alone; grid and separate show all of --heads 0,1"),
        ("max,mean", "--layout overlay shows mean alone"),
        ("all", ""),
        ("2", ""),
    ):
        run(options(clip, tmp_path, heads=heads))
        said = capsys.readouterr().out
        assert sentence in said and ("alone" in said) == bool(sentence)


@pytest.mark.parametrize("layout", ["overlay", "side-by-side", "grid", "separate"])
def test_cut_outs_and_styles_named_twice_are_drawn_once(clip: Path, tmp_path: Path, layout: str):
    run(options(clip, tmp_path, draw=("cutout", "heat", "cutout"), layout=layout, heads="0", gallery=False))
    suffix = "-head0" if layout == "separate" else ""
    files = {f"video-cutout{suffix}.mp4", f"video-heat{suffix}.mp4"}
    assert names(tmp_path) == {*files, "attention.json"}
    assert all(len(read(tmp_path / file)) == len(TIMES) for file in files)


def test_pictures_are_drawn_the_same_before_and_behind_a_video(clip: Path, tmp_path: Path):
    for name in "ab":
        Image.new("RGB", (32, 24), (90, 20, 70)).save(tmp_path / f"{name}.png")
    places = (str(tmp_path / "a.png"), str(clip), str(tmp_path / "b.png"))
    run(options(clip, tmp_path / "out", input=places, heads="0,1"))
    assert names(tmp_path / "out" / "a") == names(tmp_path / "out" / "b")
    assert "attn-mean.png" not in names(tmp_path / "out" / "a")


def test_the_frame_itself_stands_beside_its_attention(clip: Path, tmp_path: Path):
    run(options(clip, tmp_path, layout="side-by-side"))
    for frame, drawn in zip(read(clip), read(tmp_path / "video.mp4"), strict=True):
        left = drawn.pixels[:, :COLS].astype(int)
        assert np.abs(left[4:-4, 4:-4] - frame.pixels[4:-4, 4:-4]).mean() < 8


def test_several_heads_without_a_mean_are_overlaid_by_their_mean(clip: Path, tmp_path: Path):
    run(options(clip, tmp_path / "two", heads="0,1", draw=("heat",)))
    run(options(clip, tmp_path / "mean", heads="mean,0,1", draw=("heat",)))
    for one, other in zip(
        read(tmp_path / "two" / "video.mp4"), read(tmp_path / "mean" / "video.mp4"), strict=True
    ):
        # x264 does not code the same frames alike every time.
        assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 1


def test_styles_and_features_have_films_of_their_own(clip: Path, tmp_path: Path):
    run(options(clip, tmp_path, draw=("contour", "colors"), pca=True, similar_to=(3, 3)))
    assert {name for name in names(tmp_path) if name.endswith(".mp4")} == {
        "video-contour.mp4",
        "video-contour-similarity.mp4",
        "video-contour-pca.mp4",
        "video-colors.mp4",
    }


@pytest.mark.parametrize(
    ("video_format", "file"), [("avi", "video.avi"), ("gif", "video.gif"), ("png", "video/frame-000006.png")]
)
def test_other_formats(clip: Path, tmp_path: Path, video_format: str, file: str):
    run(options(clip, tmp_path, video_format=video_format, threshold=0.6))
    assert (tmp_path / file).exists()
    assert any(name.startswith("mask_th0.6") for name in names(tmp_path))


def test_a_part_of_a_clip_at_another_size(clip: Path, tmp_path: Path):
    run(options(clip, tmp_path / "a", start=0.1, end=0.39, stride=2, resize=(24, 48)))
    drawn = read(tmp_path / "a" / "video.mp4")
    assert [frame.time for frame in drawn] == [TIMES[2] - TIMES[2], TIMES[4] - TIMES[2]]
    assert drawn[0].pixels.shape == (24, 48, 3)
    run(options(clip, tmp_path / "b", size=32))
    assert read(tmp_path / "b" / "video.mp4")[0].pixels.shape == (20, 32, 3)


def test_a_stride_beyond_the_end_keeps_the_first_frame_for_the_whole_time(clip: Path, tmp_path: Path):
    run(options(clip, tmp_path, stride=10**9))
    (frame,) = read(tmp_path / "video.mp4")
    assert frame.duration == END


def test_the_command_line_takes_the_flags_of_dinos_video_script(tmp_path: Path, monkeypatch):
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in (1, 2, 10):
        Image.new("RGB", (48, 32), (20 * index, 90, 90)).save(frames / f"frame-{index}.jpg")
    line = (
        f"x --arch vit_tiny --patch_size 16 --pretrained_weights random --checkpoint_key teacher --input_path {frames} "
        f"--output_path {tmp_path / 'out'} --threshold 0.6 --resize 32 --fps 10 --video_format mp4 --device cpu"
    )
    monkeypatch.setattr(sys, "argv", line.split())
    main()
    drawn = read(tmp_path / "out" / "video.mp4")
    assert [frame.time for frame in drawn] == [0, Fraction(1, 10), Fraction(2, 10)]
    assert len(read(tmp_path / "out" / "mask_th0.6.mp4")) == 3

    line = (
        f"x --input_path {frames} --output_path {tmp_path / 'only'} --video_only --fps 5 --video_format avi"
    )
    monkeypatch.setattr(sys, "argv", line.split())
    main()
    with VideoFile(tmp_path / "only" / "video.avi") as source:
        only = list(source)
    reds = [frame.pixels[..., 0].mean() for frame in only]
    assert len(only) == 3 and reds == sorted(reds), "frame 10 comes after frame 2"


@pytest.mark.parametrize("settings", [{}, {"start": 1.3}, {"start": 1.3, "stride": 2, "resize": (16,)}])
def test_sound_stays_with_its_frames_wherever_the_part_starts(tmp_path: Path, settings: dict):
    """Frames come every 0.5 s, so that the first of the part is not at its start."""
    sound = tone(tmp_path / "tone.mkv", "pcm_s16le")
    film = slow_clip_with_sound_of(sound, tmp_path / "slow.mkv")
    run(options(film, tmp_path / "out", keep_audio=True, gallery=False, **settings))
    first = 1.5 if settings else 0.0
    begin, end, *_ = loud(tmp_path / "out" / "video.mp4")
    assert (begin, end) == pytest.approx((2 - first, 3 - first), abs=0.03)


def slow_clip_with_sound_of(file: Path, path: Path) -> Path:
    with av.open(str(file)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream("mpeg4", rate=2)
        stream.height, stream.width = ROWS, COLS
        sound = target.add_stream_from_template(source.streams.audio[0])
        for index in range(8):
            grey = np.full((ROWS, COLS, 3), 20 * index, np.uint8)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        target.mux(stream.encode(None))
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = sound
                target.mux(packet)
    return path


def test_sound_is_left_out_unless_it_is_asked_for(tmp_path: Path):
    run(options(tone(tmp_path / "tone.mkv", "pcm_s16le"), tmp_path / "out", end=0.2))
    with av.open(str(tmp_path / "out" / "video.mp4")) as container:
        assert not container.streams.audio


@pytest.mark.parametrize("normalize", ["clip", "running"])
def test_ctrl_c_leaves_no_file_and_no_thread(clip: Path, tmp_path: Path, monkeypatch, normalize: str):
    before = threading.active_count()
    monkeypatch.setattr(VideoFile, "__iter__", interrupted_at(VideoFile.__iter__, 4))
    with pytest.raises(KeyboardInterrupt) as kept:
        run(options(clip, tmp_path / "out", normalize=normalize))
    assert names(tmp_path / "out") == set() and threading.active_count() == before
    del kept  # holds the frames of the stack, and so everything in them


def interrupted_at(iterate, count: int):
    """The frames, and at the one of that number what Ctrl-C does."""

    def interrupted(source):
        for index, frame in enumerate(iterate(source)):
            if index == count:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            yield frame

    return interrupted


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_recording_of_a_camera_and_twice_throws_it_away(
    tmp_path: Path, monkeypatch, capsys, times
):
    def press(given):
        if 8 <= given < 8 + times:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    before, handler = threading.active_count(), signal.getsignal(signal.SIGINT)
    fake = FakeCamera(size=(24, 32), on_read=press)
    monkeypatch.setattr(cv2, "VideoCapture", lambda device: fake)
    if times == 1:
        run(options("3", tmp_path))
        assert 5 <= len(read(tmp_path / "video.mp4")) <= 8
        said = capsys.readouterr().out
        assert "camera 3: Ctrl-C ends the recording" in said and "Drew 1 video" in said
    else:
        fake.on_read = lambda given: given == 8 and [press(8), press(8)]
        with pytest.raises(KeyboardInterrupt):
            run(options("3", tmp_path))
        assert names(tmp_path) == set()
    assert fake.released and threading.active_count() == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_damaged_video_is_drawn_up_to_the_damage_and_it_is_said(tmp_path: Path, shared_data: Path, capsys):
    run(options(shared_data / "video" / "corrupted.mp4", tmp_path, resize=(32, 48)))
    assert len(read(tmp_path / "video.mp4")) == 28
    said = capsys.readouterr().out
    assert "corrupted.mp4" in said and "28 frames" in said
    assert "damage" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"input": ("zero.mp4",)}, "zero.mp4"),
        ({"input": ("text.mp4",)}, "text.mp4"),
        ({"input": ("gone.mp4",)}, "gone.mp4: no such file or folder"),
        ({"input": ("99",)}, "camera"),
        ({"input": (), "input_path": ("empty",)}, "empty"),
        ({"start": 3.0}, "clip.mp4"),
        ({"start": 0.3, "end": 0.2}, "--end 0.2 is not after --start 0.3"),
        ({"resize": (100_000,)}, "clip.mp4 resized to 160000 x 100000 would have frames of 16000 Mpx"),
        ({"output_dir": "text.mp4"}, "cannot write into --output_dir text.mp4: File exists"),
    ],
)
def test_a_mistake_gets_one_sentence_and_no_file(clip, tmp_path, monkeypatch, wrong, sentence):
    monkeypatch.chdir(tmp_path)
    Path("zero.mp4").touch()
    Path("text.mp4").write_text("no video")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=re.escape(sentence)) as caught:
        run(options(clip, **{"output_dir": "out", **wrong}))
    assert "\n" not in str(caught.value)
    assert not [file for file in tmp_path.glob("out/**/*") if file.is_file()]


def test_frames_are_resized_and_sampled_evenly(tmp_path: Path):
    for index in range(9):
        Image.new("RGB", (40, 20), (20 * index, 0, 0)).save(tmp_path / f"{index}.png")
    with Resized(FrameFolder(tmp_path, fps=10), 10) as source:
        assert source.size == (10, 20) == next(iter(source)).pixels.shape[:2]
        taken = [int(frame[0, 0, 0]) for frame in samples(source, 3)]
    assert taken == [0, 60, 120]
