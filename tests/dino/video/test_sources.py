"""Frames against clips made here, whose every frame is known, and real files against OpenCV and bare PyAV."""

import wave
import weakref
from fractions import Fraction
from itertools import pairwise

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, VideoReformatter
from PIL import Image

from dino.runtime.options import UserError
from dino.video.frame_folder import FrameFolder
from dino.video.video_file import VideoFile, is_video_name


def clip(path, count=20, *, rate=10, size=(48, 64), codec="libx264", times=None, **stream_settings):
    """A clip whose n-th frame is grey of level 10 n + 5 (of 250); times are in 1/1000 s."""
    options = stream_settings.pop(
        "options", {"crf": "1", "preset": "ultrafast"} if codec == "libx264" else {}
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = size
        stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in stream_settings.items():
            setattr(stream.codec_context, name, value)
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 10 * (index % 25) + 5, np.uint8), "rgb24")
            frame.pts = round(index * 1000 / rate) if times is None else times[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(source):
    """Which frames of `clip` come out."""
    return [round((float(frame.pixels.mean()) - 5) / 10) for frame in source]


def total(frames):
    return frames[-1].time + frames[-1].duration


HEALTHY = {
    "asl_brother_mildvfr.mkv": (65, (480, 640)),
    "asl_walk.mkv": (89, (480, 640)),
    "av1_video.mkv": (125, (360, 640)),
    "car-detection.mp4": (377, (432, 768)),
    "cockatoo.mp4": (280, (720, 1280)),
    "cockatoo_vfr.mp4": (85, (360, 640)),
    "cockatoo_yuv444.mp4": (280, (720, 1280)),
    "flipping_a_pancake.mkv": (310, (240, 426)),
    "nasa_13013_rotated.mp4": (17, (480, 270)),
    "non_zero_start.mp4": (12, (112, 200)),
    "rotated90.mov": (3, (568, 320)),
    "synthetic_odd_size_vp9.mp4": (25, (241, 321)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("cockatoo")) for name in HEALTHY]
)
def test_a_healthy_file_gives_all_frames_at_the_times_it_states_and_no_alarm(name, shared_data):
    count, size = HEALTHY[name]
    file = shared_data / "video" / name
    with av.open(str(file)) as container:
        stamps = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert len(stamps) == count
    with VideoFile(file) as source:
        assert source.size == size and abs(source.length - count) <= 1
        for frame, stamp, following in zip(source, stamps, [*stamps[1:], None], strict=True):
            assert frame.pixels.shape == (*size, 3) and frame.time == stamp - stamps[0]
            assert frame.duration > 0 if following is None else frame.duration == following - stamp
    assert source.damage == ""


@pytest.mark.parametrize(
    "name", ["asl_walk.mkv", "nasa_13013_rotated.mp4", "rotated90.mov", "synthetic_odd_size_vp9.mp4"]
)
def test_pixels_are_upright_and_coloured_as_opencv_has_them(name, shared_data):
    capture = cv2.VideoCapture(str(shared_data / "video" / name))
    for frame, _ in zip(VideoFile(shared_data / "video" / name), range(5), strict=False):
        expected = capture.read()[1][..., ::-1]
        assert np.abs(frame.pixels.astype(int) - expected).mean() < 1


def test_damage_is_told_with_all_frames_before_it(shared_data):
    source = VideoFile(shared_data / "video" / "corrupted.mp4")
    assert sum(1 for _ in source) == 28
    assert source.damage == (
        "corrupted.mp4 is damaged after 28 frames (2.80 s): invalid data found when processing input; "
        "what came before is drawn"
    )
    assert sum(1 for _ in VideoFile(shared_data / "video" / "corrupted.mp4", end=2)) == 20
    with pytest.raises(
        UserError, match=r"no frame from 3 s on: it is 2.80 s long \(corrupted.mp4 is damaged"
    ):
        VideoFile(shared_data / "video" / "corrupted.mp4", start=3)


def test_a_file_that_ends_before_its_header_says_is_told(shared_data):
    source = VideoFile(shared_data / "video" / "asl_walk_truncated.mkv")
    assert sum(1 for _ in source) == 40
    assert source.damage == (
        "asl_walk_truncated.mkv ends after 40 frames (1.37 s) though its header says 2.97 s: it was cut short; "
        "what it holds is drawn"
    )
    source = VideoFile(shared_data / "video" / "asl_walk_truncated.mkv", end=1)
    assert sum(1 for _ in source) == 30 and not source.damage
    with pytest.raises(UserError, match=r"cockatoo_truncated.mp4 is not a video .* or its end is missing"):
        VideoFile(shared_data / "video" / "cockatoo_truncated.mp4")


@pytest.mark.parametrize("suffix", ["mkv", "avi", "mp4"])
def test_half_a_file_gives_half_its_frames_and_a_sentence(suffix, tmp_path, capfd):
    whole, half = tmp_path / f"whole.{suffix}", tmp_path / f"half.{suffix}"
    random = np.random.default_rng(0)
    with av.open(str(whole), "w", options={"movflags": "+faststart"} if suffix == "mp4" else {}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = 48, 64
        for _ in range(40):
            picture = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    source = VideoFile(whole)
    assert sum(1 for _ in source) == 40 and source.damage == ""
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    source = VideoFile(half)
    assert 10 <= sum(1 for _ in source) <= 30
    assert "damaged after" in source.damage or "though its header says" in source.damage
    assert capfd.readouterr() == ("", "")


def headless(path):
    with av.open(str(path), "w") as container:
        container.add_stream("libx264", rate=10)
        container.start_encoding()
    return path


def sound_alone(path):
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    return path


def written(path, content):
    path.write_bytes(content)
    return path


REFUSED = {
    "there is no video": lambda folder: folder / "missing.mp4",
    "is a folder, not a video": lambda folder: folder,
    "is empty: 0 bytes": lambda folder: written(folder / "empty.mp4", b""),
    "is not a video that can be read": lambda folder: written(folder / "text.mp4", b"not a video\n" * 99),
    "is a picture, not a video": lambda folder: (
        Image.new("RGB", (9, 9)).save(folder / "a.png") or (folder / "a.png").rename(folder / "a.mp4")
    ),
    "holds sound but no pictures": lambda folder: sound_alone(folder / "sound.mp4"),
    "no frame that can be decoded|not a video": lambda folder: headless(folder / "none.mkv"),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_no_video_is_refused_with_one_sentence_and_silence(sentence, tmp_path, capfd):
    with pytest.raises(UserError, match=sentence) as refusal:
        VideoFile(REFUSED[sentence](tmp_path))
    assert "\n" not in str(refusal.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("stride", [1, 3, 7, 50])
def test_a_stride_keeps_the_duration(stride, tmp_path):
    file = clip(tmp_path / "a.mp4")
    frames = list(source := VideoFile(file, stride=stride))
    assert numbers(frames) == list(range(0, 20, stride))
    assert total(frames) == 2 and source.length == len(frames) and source.rate == Fraction(10, stride)
    assert all(one.time + one.duration == two.time for one, two in pairwise(frames))


@pytest.mark.parametrize("cut", [0.1, 0.5, 1 / 3, 1.0, 1.85])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_two_parts_are_the_whole(cut, suffix, tmp_path):
    file = clip(tmp_path / f"a.{suffix}", codec="mpeg4")
    first, second = list(VideoFile(file, end=cut)), list(VideoFile(file, start=cut))
    assert numbers([*first, *second]) == list(range(20))
    assert first[0].time == second[0].time == 0
    assert abs(total(first) - Fraction(cut)) < Fraction(1, 1000)


def test_times_that_vary_start_anywhere_and_stand_still_come_from_the_file(tmp_path):
    times = [500, 540, 700, 1000, 2500, 2533]
    source = VideoFile(clip(tmp_path / "a.mkv", 6, times=times))
    frames = list(source)
    assert [1000 * frame.time + 500 for frame in frames] == times and source.origin == Fraction(1, 2)
    assert [1000 * frame.duration for frame in frames[:-1]] == [40, 160, 300, 1500, 33]
    late = VideoFile(tmp_path / "a.mkv", start=0.1)
    assert late.begins == Fraction(1, 5) and [frame.time for frame in late][1] == Fraction(3, 10)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_seeking_gives_exactly_the_frames_that_decoding_from_the_beginning_gives(suffix, tmp_path):
    form = {"codec": "mpeg4"} if suffix == "avi" else {"max_b_frames": 2, "gop_size": 12}
    file = clip(tmp_path / f"a.{suffix}", 150, options={}, **form)
    whole = list(VideoFile(file))
    assert len(whole) == 150
    for start in (2.5, 6.0, 11.95, 14.9):
        source = VideoFile(file, start=start)
        expected = [frame for frame in whole if frame.time >= Fraction(str(start))]
        for frame, other in zip(source, expected, strict=True):
            assert frame.time == other.time - expected[0].time
            np.testing.assert_array_equal(frame.pixels, other.pixels)
        assert source.begins == expected[0].time and source.length == len(expected)


def test_a_start_after_the_end_is_refused_with_the_length(tmp_path):
    file = clip(tmp_path / "a.mp4")
    for start in (2.0, 100.0):
        with pytest.raises(UserError, match=rf"a.mp4 has no frame from {start:g} s on: it is 2.00 s long"):
            VideoFile(file, start=start)
    with pytest.raises(UserError, match=r"no frame from 0.51 s to 0.55 s"):
        VideoFile(file, start=0.51, end=0.55)


@pytest.mark.parametrize(
    "settings", [{"start": -1}, {"start": 2, "end": 1}, {"end": 0.0}, {"stride": 0}, {"start": float("nan")}]
)
def test_an_impossible_span_is_refused(settings, tmp_path):
    with pytest.raises(UserError, match=r"the (start|end|stride)"):
        VideoFile(clip(tmp_path / "a.mp4", 2), **settings)


def test_a_second_recording_in_the_file_goes_on_in_time_and_in_size(tmp_path):
    one, two = clip(tmp_path / "1.ts", 15), clip(tmp_path / "2.ts", 15, size=(96, 96))
    both = written(tmp_path / "both.ts", one.read_bytes() + two.read_bytes())
    frames = list(VideoFile(both))
    assert {frame.pixels.shape for frame in frames} == {(48, 64, 3)}
    assert len(frames) == 30 and total(frames) == 3
    last = frames[-1].pixels
    assert not last[:, :7].any() and last[:, 9:55].min() > 130  # a square in the middle of black


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    for aspect, size in ((Fraction(2), (48, 128)), (Fraction(3, 4), (64, 64)), (Fraction(99, 100), (48, 64))):
        file = clip(tmp_path / "a.mkv", 2, sample_aspect_ratio=aspect)
        assert VideoFile(file).size == size


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix, told, rows", [(1, 1, 64), (5, 5, 64), (9, 9, 64), (5, 2, 64), (1, 2, 720)])
@pytest.mark.parametrize("form", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_colours_follow_matrix_and_range(full, matrix, told, rows, form, tmp_path):
    colour = (200, 40, 90)
    picture = av.VideoFrame.from_ndarray(np.full((rows, 64, 3), colour, np.uint8), "rgb24")
    extent = ColorRange.JPEG if full else ColorRange.MPEG
    yuv = VideoReformatter().reformat(picture, format=form, dst_colorspace=matrix, dst_color_range=extent)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = rows, 64, form
        stream.codec_context.colorspace, stream.codec_context.color_range = told, extent
        yuv.colorspace = told
        container.mux(stream.encode(yuv))
        container.mux(stream.encode(None))
    pixels = next(iter(VideoFile(tmp_path / "a.mkv"))).pixels
    assert np.abs(pixels.astype(int) - colour).max() <= 3


def test_frames_are_let_go_as_the_next_ones_come_and_can_be_had_again(tmp_path):
    source = VideoFile(clip(tmp_path / "a.mp4"))
    alive: list = []
    for frame in source:
        alive.append(weakref.ref(frame.pixels))
        assert sum(reference() is not None for reference in alive) <= 2
    assert numbers(source) == numbers(one for one, _ in zip(source, source, strict=True)) == list(range(20))


def test_names_of_videos_are_known_by_their_suffix():
    assert all(map(is_video_name, ("a.mp4", "b.MOV", "c.d.mkv", "e.webm", "f.m2ts", "x/y.avi")))
    assert not any(map(is_video_name, ("a.gif", "b.png", "mp4", "c.mp4.txt", "")))


def picture(path, level, size=(6, 8)):
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)


def test_pictures_of_a_folder_come_in_natural_order(tmp_path):
    order = [1, 2, 10, 99, 100, 9999, 10000]
    for level, number in enumerate(order):
        picture(tmp_path / f"frame-{number}.png", level)
    (tmp_path / "frames.csv").write_text("name,time\n")
    picture(tmp_path / ".hidden.png", 99)
    source = FrameFolder(tmp_path, fps=20)
    frames = list(source)
    assert [int(frame.pixels[0, 0, 0]) for frame in frames] == list(range(7))
    assert [frame.time for frame in frames] == [Fraction(n, 20) for n in range(7)]
    assert source.length == 7 and source.size == (6, 8) and total(frames) == Fraction(7, 20)
    part = list(FrameFolder(tmp_path, fps=20, start=0.05, end=0.3, stride=2))
    assert [int(frame.pixels[0, 0, 0]) for frame in part] == [1, 3, 5]
    assert total(part) == Fraction(1, 4)


def test_a_broken_picture_is_named_and_its_time_kept(tmp_path):
    for number in (1, 3):
        picture(tmp_path / f"{number}.png", number)
    (tmp_path / "2.png").write_bytes(b"no picture")
    picture(tmp_path / "4.jpg", 200, size=(6, 4))
    for _ in range(2):
        frames = list(source := FrameFolder(tmp_path, fps=10))
        assert [frame.time for frame in frames] == [0, Fraction(1, 5), Fraction(3, 10)]
        assert source.damage == f"{tmp_path.name} is drawn without 2.png: not a picture that Pillow can read"
    assert frames[-1].pixels[:, 2:6].min() > 190 and not frames[-1].pixels[:, [0, 1, 6, 7]].any()


def test_broken_pictures_at_both_ends_leave_the_folder_its_time(tmp_path):
    for number in (2, 3):
        picture(tmp_path / f"{number}.png", number)
    for number in (1, 4, 5):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    frames = list(source := FrameFolder(tmp_path, fps=10))
    assert [(frame.time, frame.duration) for frame in frames] == [
        (0, Fraction(1, 10)),
        (Fraction(1, 10), Fraction(3, 10)),
    ]
    assert source.begins == Fraction(1, 10)


def test_a_folder_without_frames_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the folder"):
        FrameFolder(tmp_path / "x")
    with pytest.raises(UserError, match="no pictures in"):
        FrameFolder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"can be read: .* without a.png"):
        FrameFolder(tmp_path)
    with pytest.raises(UserError, match=r"1 pictures, 0.04 s long, but none from 7 s on"):
        FrameFolder(tmp_path, start=7)
