"""Clips that are written, read back by PyAV, OpenCV and Pillow."""

import csv
import shutil
import weakref
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dino.runtime.options import UserError
from dino.video.video_file import VideoFile
from dino.video.writer import FORMATS, VideoWriter
from tests.dino.video.clips import names, opencv_count, picture, read, write
from tests.full_disk import full_disk

STEADY = {
    rate: [1 / rate] * 20 for rate in map(Fraction, ("10", "12.5", "25", "30000/1001", "24000/1001", "60"))
}
VARYING = [Fraction(n, 1000) for n in (33, 34, 33, 500, 67, 1, 2000, 40, 33, 1500)]


@pytest.mark.parametrize("rate", STEADY)
def test_mp4_keeps_times_of_steady_rates_exactly(rate, tmp_path):
    times = write(tmp_path / "a.mp4", STEADY[rate], rate=rate)
    frames, duration = read(tmp_path / "a.mp4")
    assert frames == [(time, 1 / rate) for time in times[:-1]] and duration == times[-1]
    assert opencv_count(tmp_path / "a.mp4") == 20


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(1700, 157), Fraction(1234567, 89123)])
def test_mp4_keeps_times_that_vary_exactly_with_the_last_duration(rate, tmp_path):
    times = write(tmp_path / "a.mp4", VARYING, rate=rate)
    frames, duration = read(tmp_path / "a.mp4")
    assert frames == list(zip(times, VARYING, strict=False)) and duration == times[-1]
    assert opencv_count(tmp_path / "a.mp4") == len(VARYING)


def test_an_mp4_of_one_frame_lasts_as_long_as_it_was_told(tmp_path):
    write(tmp_path / "a.mp4", [Fraction(7, 2)], size=(1, 1))
    assert read(tmp_path / "a.mp4") == ([(0, Fraction(7, 2))], Fraction(7, 2))


@pytest.mark.parametrize(
    "name", ["asl_brother_mildvfr.mkv", "cockatoo_vfr.mp4", "nasa_13013_rotated.mp4", "non_zero_start.mp4"]
)
def test_real_clips_come_back_with_the_frames_times_and_shape_that_they_had(name, shared_data, tmp_path):
    file = shared_data / "video" / name
    spans = []
    with VideoFile(file) as source, VideoWriter(tmp_path / "a.mp4", source.size, source.rate) as writer:
        for frame in source:
            writer.write(frame.pixels, frame.time, frame.duration)
            spans.append((frame.time, frame.duration))
    again = VideoFile(tmp_path / "a.mp4")
    assert again.size == source.size and again.damage == ""
    for frame, (time, duration), original in zip(again, spans, VideoFile(file), strict=True):
        assert abs(frame.time - time) <= Fraction(1, 90_000) and abs(frame.duration - duration) <= Fraction(
            1, 90_000
        )
        assert np.abs(frame.pixels.astype(int) - original.pixels).mean() < 6


def test_mp4_is_what_browsers_play(tmp_path):
    write(tmp_path / "a.mp4", [Fraction(1, 10)] * 60)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.has_b_frames) == ("h264", "yuv420p", False)
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)
        keyframes = [
            packet.pts * packet.time_base for packet in container.demux(stream) if packet.is_keyframe
        ]
    assert max(two - one for one, two in pairwise([*keyframes, Fraction(6)])) <= 2
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
@pytest.mark.parametrize("size", [(64, 64), (720, 16)])
def test_colours_come_back(name, size, tmp_path):
    colours = [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (0, 0, 0),
        (128, 128, 128),
        (250, 170, 20),
    ]
    with VideoWriter(tmp_path / name, size, Fraction(10)) as writer:
        for index, colour in enumerate(colours):
            writer.write(np.full((*size, 3), colour, np.uint8), Fraction(index, 10), Fraction(1, 10))
    for frame, colour in zip(VideoFile(tmp_path / name), colours, strict=True):
        assert np.abs(frame.pixels.astype(int) - colour).max() <= (3 if name == "a.mp4" else 6)


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_odd_sides_are_made_even_by_repeating_the_last_row_and_column(suffix, tmp_path):
    write(tmp_path / f"a.{suffix}", STEADY[10], size=(47, 33))
    frame = next(iter(VideoFile(tmp_path / f"a.{suffix}"))).pixels.astype(int)
    assert frame.shape == (48, 34, 3)
    expected = np.pad(picture(0, (47, 33)), ((0, 1), (0, 1), (0, 0)), mode="edge")
    assert np.abs(frame - expected)[-2:].mean() < 8 and np.abs(frame - expected)[:, -2:].mean() < 8


def test_avi_repeats_and_leaves_out_frames_to_keep_their_times(tmp_path):
    times = write(
        tmp_path / "a.avi", [Fraction(n, 100) for n in (10, 30, 10, 2, 3, 5, 100)], rate=Fraction(10)
    )
    frames, duration = read(tmp_path / "a.avi")
    assert frames == [(Fraction(n, 10), Fraction(1, 10)) for n in range(16)]
    assert duration == times[-1] == Fraction(16, 10)
    assert opencv_count(tmp_path / "a.avi") == 16
    shown = [int(np.median(frame.pixels[..., 2]) - 40 + 3) // 7 for frame in VideoFile(tmp_path / "a.avi")]
    assert shown[:5] == [0, 1, 1, 1, 2] and shown[6:] == [6] * 10


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30000, 1001), Fraction(15)])
def test_gif_delays_do_not_drift(rate, tmp_path):
    times = write(tmp_path / "a.gif", [*[1 / rate] * 90, Fraction(3, 4)], rate=rate)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 91 and image.size == (64, 48) and image.info["loop"] == 0
        shown = 0
        for index, (begin, end) in enumerate(pairwise(times)):
            image.seek(index)
            assert abs(shown - 1000 * begin) <= 5
            shown += image.info["duration"]
            assert abs(shown - 1000 * end) <= 5
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - picture(90)).mean() < 6


def test_gif_leaves_out_what_browsers_would_slow_down(tmp_path):
    write(tmp_path / "a.gif", [Fraction(1, 100)] * 50, rate=Fraction(100))
    with Image.open(tmp_path / "a.gif") as image:
        delays = [image.seek(index) or image.info["duration"] for index in range(image.n_frames)]
    assert delays == [20] * 25


@pytest.mark.parametrize("last", [Fraction(600), Fraction(7000)])
def test_a_gif_that_stands_still_does_so_for_as_long_as_a_gif_can(last, tmp_path):
    write(tmp_path / "a.gif", [Fraction(1, 10), last])
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(1)
        assert image.info["duration"] == min(1000 * last, 655_350)


def test_pictures_are_exact_numbered_and_tabled(tmp_path):
    times = write(tmp_path / "frames", VARYING)
    expected = [f"frame-{n:06}.png" for n in range(1, 11)]
    assert names(tmp_path) == ["frames"] and names(tmp_path / "frames") == [*expected, "frames.csv"]
    for index, name in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "frames" / name)), picture(index))
    with (tmp_path / "frames" / "frames.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["name"] for row in rows] == expected
    assert [Fraction(row["time"]) for row in rows] == times[:-1]
    assert [Fraction(row["duration"]) for row in rows] == VARYING


def test_pictures_replace_an_earlier_clip_but_nothing_else(tmp_path):
    write(tmp_path / "frames", VARYING, format="png")
    write(tmp_path / "frames", VARYING[:2], format="png")
    assert names(tmp_path / "frames") == ["frame-000001.png", "frame-000002.png", "frames.csv"]
    (tmp_path / "frames" / ".DS_Store").touch()
    write(tmp_path / "frames", VARYING[:2], format="png")
    (tmp_path / "frames" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files, such as thesis.tex"):
        write(tmp_path / "frames", VARYING, format="png")
    assert len(names(tmp_path / "frames")) == 4


TARGETS = ["a.mp4", "a.avi", "a.gif", "frames"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("count", [0, 1, 30])
@pytest.mark.parametrize("target", TARGETS)
def test_an_error_leaves_nothing_behind_and_what_was_there_unchanged(target, count, error, tmp_path):
    def interrupted():
        with VideoWriter(tmp_path / target, (48, 64), Fraction(10)) as writer:
            for index in range(count):
                writer.write(picture(index), Fraction(index, 10), Fraction(1, 10))
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == []
    write(tmp_path / target, STEADY[10])
    before = [file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()]
    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == [target]
    assert [file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()] == before


@pytest.mark.parametrize("step", ["aside", "in place", "removed"])
def test_a_folder_that_is_replaced_is_the_old_or_the_new_wherever_it_is_interrupted(
    step, tmp_path, monkeypatch
):
    write(tmp_path / "frames", STEADY[10])
    replace, rmtree = Path.replace, shutil.rmtree

    def replacing(path, target):
        result = replace(path, target)
        if step == ("in place" if target.name == "frames" else "aside"):
            monkeypatch.undo()
            raise KeyboardInterrupt
        return result

    def removing(path):
        if step == "removed":
            (path / "frame-000001.png").unlink()
            monkeypatch.undo()
            raise KeyboardInterrupt
        rmtree(path)

    monkeypatch.setattr(Path, "replace", replacing)
    monkeypatch.setattr(shutil, "rmtree", removing)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "frames", VARYING)
    whole = 20 if step == "aside" else len(VARYING)
    assert len(names(tmp_path / "frames")) == whole + 1
    write(tmp_path / "frames", VARYING[:3])
    assert names(tmp_path) == ["frames"] and len(names(tmp_path / "frames")) == 4


@pytest.mark.parametrize("limit", [3, 300, 20_000])
@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_is_one_sentence_and_nothing_is_left(target, limit, tmp_path):
    random = np.random.default_rng(0)
    with (
        full_disk(limit),
        pytest.raises(UserError, match=r"cannot write .*File too large") as refusal,
        VideoWriter(tmp_path / target, (96, 96), Fraction(10)) as writer,
    ):
        for index in range(30):
            noise = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
            writer.write(noise, Fraction(index, 10), Fraction(1, 10))
    assert "\n" not in str(refusal.value) and names(tmp_path) == []


def test_what_cannot_be_written_is_refused_before_the_first_frame(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for path, sentence in (
        ("a.webm", r"ends in none of .mp4, .avi, .gif; a name without"),
        ("folder.mp4", "is a folder; name a file in it"),
        ("file", "is a file; the pictures need a folder"),
        ("missing/a.mp4", "cannot write .*: No such file or directory"),
        ("missing/frames", "cannot write .*: No such file or directory"),
        ("file/a.gif", "cannot write .*: Not a directory"),
    ):
        with pytest.raises(UserError, match=sentence), VideoWriter(tmp_path / path, (4, 4), Fraction(1)):
            pytest.fail("reached the frames")
    assert names(tmp_path) == ["file", "folder.mp4"]


@pytest.mark.parametrize(("target", "longest"), [("a.mp4", 16_384), ("a.avi", 8190), ("a.gif", 65_535)])
def test_sides_that_a_format_cannot_have_are_refused_before_the_first_frame(target, longest, tmp_path):
    write(tmp_path / target, [Fraction(1)], size=(2, longest))
    with pytest.raises(
        UserError, match=rf"at most {longest} pixels wide and high, got 2 x {longest + 1}; .*--size"
    ):
        VideoWriter(tmp_path / target, (longest + 1, 2), Fraction(1))
    write(tmp_path / "frames", [Fraction(1)], size=(2, longest + 1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rate", [Fraction(1, 10**9), Fraction(1000)])
def test_a_rate_may_be_very_low_or_high(target, rate, tmp_path):
    write(tmp_path / target, [Fraction(3, 10)] * 2, rate=rate)
    if target == "a.mp4":
        assert read(tmp_path / target) == ([(0, Fraction(3, 10)), (Fraction(3, 10),) * 2], Fraction(6, 10))


@pytest.mark.parametrize("target", TARGETS)
def test_a_clip_without_frames_is_refused(target, tmp_path):
    with pytest.raises(UserError, match="there is no frame to write"):
        write(tmp_path / target, [])
    assert names(tmp_path) == []


def test_frames_of_another_shape_or_out_of_order_are_refused(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", (48, 64), Fraction(10)) as writer:
        writer.write(picture(0), Fraction(0), Fraction(1, 10))
        for pixels, time, duration in ((picture(1, (64, 48)), 1, 1), (picture(1), 0, 1), (picture(1), 1, 0)):
            with pytest.raises(ValueError, match="frame"):
                writer.write(pixels, Fraction(time), Fraction(duration))


@pytest.mark.parametrize("target", TARGETS)
def test_frames_are_let_go_when_written(target, tmp_path):
    alive: list = []
    with VideoWriter(tmp_path / target, (48, 64), Fraction(10)) as writer:
        for index in range(120):
            pixels = picture(index % 20)
            before = pixels.copy()
            writer.write(pixels, Fraction(index, 10), Fraction(1, 10))
            np.testing.assert_array_equal(pixels, before)
            alive.append(weakref.ref(pixels))
            del pixels
            assert sum(reference() is not None for reference in alive) <= 1


def test_the_format_can_be_named_and_what_a_killed_writer_left_is_overwritten(tmp_path):
    (tmp_path / ".clip.part").mkdir()
    (tmp_path / ".clip.part" / "frame-000001.png").touch()
    assert set(FORMATS) == {"mp4", "avi", "gif", "png"}
    write(tmp_path / "clip", STEADY[10], format="mp4")
    assert names(tmp_path) == ["clip"] and len(read(tmp_path / "clip")[0]) == 20
