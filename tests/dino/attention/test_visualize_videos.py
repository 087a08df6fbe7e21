"""The command for videos: which films it writes, what is in them, and what it says to mistakes."""

import json
import re
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dino.attention.video_outputs import Resized, samples
from dino.attention.visualize import main, run
from dino.attention.visualize_options import VisualizeOptions
from dino.runtime.options import UserError
from dino.video.clip import Frame
from dino.video.frame_folder import FrameFolder
from dino.video.video_file import VideoFile
from dino.video.writer import VideoWriter

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
        np.testing.assert_array_equal(one.pixels, other.pixels)


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


def test_sound_is_kept_on_request(tmp_path: Path):
    silent = save_clip(tmp_path / "silent.mp4")
    source = tmp_path / "with_sound.mp4"
    add_sound(silent, source)
    for keep_audio in (True, False):
        run(options(source, tmp_path / "out", keep_audio=keep_audio))
        with av.open(str(tmp_path / "out" / "video.mp4")) as container:
            assert bool(container.streams.audio) == keep_audio


def add_sound(silent: Path, path: Path) -> None:
    with av.open(str(silent)) as source, av.open(str(path), "w") as target:
        picture = target.add_stream_from_template(source.streams.video[0])
        sound = target.add_stream("aac", rate=48000, layout="mono")
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                target.mux(packet)
        tone = np.sin(np.arange(48000 // 2) / 20).astype(np.float32)[None]
        for start in range(0, tone.shape[1] - 1024, 1024):
            frame = av.AudioFrame.from_ndarray(tone[:, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            target.mux(sound.encode(frame))
        target.mux(sound.encode(None))


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
