"""Sound that is taken along: in time with the pictures, and never in their way."""

from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest

from dino.runtime.options import UserError
from dino.video.sound import Sound
from dino.video.writer import VideoWriter
from tests.dino.video.clips import names, picture, read, write

STEADY = [Fraction(1, 10)] * 20


def tone(path, codec, *, begin=0.0, seconds=4, rate=48_000, without=(0.0, 0.0)):
    """A clip that is silent but for one loud second from 2 to 3; pictures and sound start at `begin`.

    Args:
        without: a time from which, and one to which, the file has no sound.
    """
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
            if not without[0] <= index / 10 < without[1]:
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


@pytest.mark.parametrize("without", [(0.0, 0.8), (0.8, 1.5)])
@pytest.mark.parametrize("codec", ["pcm_s16le", "libmp3lame"])
@pytest.mark.parametrize("target", ["a.mp4", "a.avi"])
def test_sound_that_starts_late_or_has_a_gap_stays_in_time(without, codec, target, tmp_path):
    file = tone(tmp_path / "s.mkv", codec, without=without)
    write(tmp_path / target, [Fraction(1, 10)] * 35, audio_from=file)
    begin, end, *_ = loud(tmp_path / target)
    assert abs(begin - 2) < 0.03 and abs(end - 3) < 0.03


@pytest.mark.parametrize("target", ["a.mp4", "a.avi"])
def test_the_sound_of_a_second_recording_in_the_file_goes_on_behind_the_first(target, tmp_path):
    one = tone(tmp_path / "1.ts", "aac").read_bytes()
    (tmp_path / "2.ts").write_bytes(one + one)
    write(tmp_path / target, [Fraction(1, 10)] * 80, audio_from=tmp_path / "2.ts")
    begin, end, over, _ = loud(tmp_path / target)
    assert abs(begin - 2) < 0.03 and abs(end - 7) < 0.08 and abs(over - 8) < 0.06


@pytest.mark.parametrize("target", ["a.mp4", "a.avi"])
def test_sound_whose_times_are_damaged_does_not_cost_the_pictures(target, tmp_path):
    content = bytearray(tone(tmp_path / "s.mkv", "aac").read_bytes())
    for place in np.random.default_rng(0).integers(len(content) // 3, len(content), 60):
        content[place] ^= 255
    (tmp_path / "s.mkv").write_bytes(content)
    write(tmp_path / target, [Fraction(1, 10)] * 40, audio_from=tmp_path / "s.mkv")
    assert len(read(tmp_path / target)[0]) == 40


def test_a_source_without_sound_is_fine_and_one_that_cannot_be_read_is_refused(tmp_path):
    write(tmp_path / "silent.mp4", STEADY)
    write(tmp_path / "a.mp4", STEADY, audio_from=tmp_path / "silent.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert not container.streams.audio
    with pytest.raises(UserError, match=r"cannot read the sound of .*missing.mp4: No such file"):
        write(tmp_path / "b.mp4", STEADY, audio_from=tmp_path / "missing.mp4")
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
