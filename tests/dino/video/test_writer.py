"""Clips that are written, read back by PyAV, OpenCV and Pillow."""

import csv
import resource
import signal
import weakref
from fractions import Fraction
from itertools import islice, pairwise

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from dino.runtime.options import UserError
from dino.video.sound import Sound
from dino.video.video_file import VideoFile
from dino.video.writer import FORMATS, VideoWriter


def picture(index, size=(48, 64)):
    """Smooth, so that it survives coding, and another for each index."""
    rows, cols = np.mgrid[0 : size[0], 0 : size[1]]
    channels = [rows * 2 + index * 5, cols * 2 + index * 3, np.full(size, 40 + index * 7)]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def write(path, durations, size=(48, 64), rate=Fraction(10), **settings):
    """One picture for each duration; returns their times and the end."""
    times = [Fraction(0)]
    with VideoWriter(path, size, rate, **settings) as writer:
        for index, duration in enumerate(durations):
            writer.write(picture(index, size), times[-1], Fraction(duration))
            times.append(times[-1] + Fraction(duration))
    return times


def read(path):
    """By PyAV: (time, duration) of each frame and of the whole stream."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            (frame.pts * stream.time_base, frame.duration * stream.time_base)
            for frame in container.decode(stream)
        ]
        return frames, stream.duration * stream.time_base


def opencv_count(path):
    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        count += 1
    return count


def names(folder):
    return sorted(file.name for file in folder.iterdir())


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
    (tmp_path / "frames" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files, such as thesis.tex"):
        write(tmp_path / "frames", VARYING, format="png")
    assert len(names(tmp_path / "frames")) == 4


def tone(path, codec, *, begin=0.0, seconds=4, rate=48_000):
    """A clip that is silent but for one loud second from 2 to 3; pictures and sound start at `begin`."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        video.height, video.width = 32, 32
        video.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream(codec, rate=rate)
        for index in range(seconds * 10):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            frame.pts = round((begin + index / 10) * 1000)
            container.mux(video.encode(frame))
            at = np.arange(rate // 10) / rate + index / 10
            wave = np.where((at >= 2) & (at < 3), 0.5 * np.sin(2 * np.pi * 440 * at), 0)
            sound = av.AudioFrame.from_ndarray((32767 * wave).astype(np.int16)[None], "s16", "mono")
            sound.rate, sound.time_base = rate, Fraction(1, rate)
            sound.pts = round(begin * rate) + index * (rate // 10)
            container.mux(audio.encode(sound))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path


def loud(path):
    """When the loud second begins and ends, the sound's end and its codec, in a file that was written."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        chunks = [(float(frame.pts * frame.time_base), frame) for frame in container.decode(stream)]
        at = np.concatenate([time + np.arange(frame.samples) / frame.sample_rate for time, frame in chunks])
        level = np.concatenate(
            [frame.to_ndarray().astype(float).reshape(-1, frame.samples)[0] for _, frame in chunks]
        )
        heard = at[np.abs(level) > 0.2 * np.abs(level).max()]
        return heard[0], heard[-1], at[-1], stream.codec_context.codec.canonical_name


def sound_length(path):
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        return float(stream.duration * stream.time_base)


@pytest.mark.parametrize(
    "source, codec, target, expected",
    [
        ("s.mp4", "aac", "a.mp4", "aac"),
        ("s.mkv", "libmp3lame", "a.mp4", "mp3"),
        ("s.mkv", "libopus", "a.mp4", "opus"),
        ("s.mkv", "flac", "a.mp4", "flac"),
        ("s.ts", "aac", "a.mp4", "aac"),
        ("s.mkv", "pcm_s16le", "a.mp4", "aac"),
        ("s.mkv", "ac3", "a.mp4", "aac"),
        ("s.mp4", "aac", "a.avi", "mp3"),
        ("s.mkv", "libmp3lame", "a.avi", "mp3"),
    ],
)
@pytest.mark.parametrize("start", [0.0, 1.5])
def test_sound_is_kept_in_time_and_cut_to_the_pictures(source, codec, target, expected, start, tmp_path):
    file = tone(tmp_path / source, codec, begin=1.0 if source == "s.mkv" else 0.0)
    count = 18 if start else 35
    write(tmp_path / target, [Fraction(1, 10)] * count, audio_from=file, audio_start=start)
    begin, end, over, name = loud(tmp_path / target)
    assert name == expected
    assert abs(begin - (2 - start)) < 0.03 and abs(end - (3 - start)) < 0.03
    assert count / 10 - 0.06 < over <= count / 10 + 0.001
    frames, duration = read(tmp_path / target)
    assert len(frames) == count and frames[0][0] == 0 and duration == Fraction(count, 10)
    with av.open(str(tmp_path / target)) as container:
        assert abs(container.duration / av.time_base - count / 10) < 0.03


def test_a_source_without_sound_is_fine_and_one_that_cannot_be_read_is_refused(tmp_path):
    write(tmp_path / "silent.mp4", STEADY[10])
    write(tmp_path / "a.mp4", STEADY[10], audio_from=tmp_path / "silent.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert not container.streams.audio
    with pytest.raises(UserError, match=r"cannot read the sound of .*missing.mp4: No such file"):
        write(tmp_path / "b.mp4", STEADY[10], audio_from=tmp_path / "missing.mp4")
    assert names(tmp_path) == ["a.mp4", "silent.mp4"]


def test_sound_that_is_damaged_ends_there_and_is_told(tmp_path, monkeypatch):
    def damaged(sound):
        yield from islice(copied(sound), 50)
        raise av.InvalidDataError(0, "Invalid data")

    copied = Sound._copied
    monkeypatch.setattr(Sound, "_copied", damaged)
    file = tone(tmp_path / "s.mp4", "aac")
    with VideoWriter(tmp_path / "a.mp4", (48, 64), Fraction(1), audio_from=file) as writer:
        for index in range(4):
            writer.write(picture(index), Fraction(index), Fraction(1))
    assert writer.damage == "the sound of s.mp4 is damaged and ends early: Invalid data"
    assert sound_length(tmp_path / "a.mp4") < 1.1 and read(tmp_path / "a.mp4")[1] == 4


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


@pytest.mark.parametrize("limit", [3, 300, 20_000])
@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_is_one_sentence_and_nothing_is_left(target, limit, tmp_path):
    random = np.random.default_rng(0)
    limits, on_signal = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"cannot write .*File too large") as refusal,
            VideoWriter(tmp_path / target, (96, 96), Fraction(10)) as writer,
        ):
            for index in range(30):
                noise = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
                writer.write(noise, Fraction(index, 10), Fraction(1, 10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, on_signal)
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
