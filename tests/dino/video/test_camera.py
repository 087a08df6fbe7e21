"""Cameras that are none: what comes when, and how they end."""

import contextlib
import signal
from fractions import Fraction
from itertools import pairwise

import pytest

from dino.runtime.options import UserError
from dino.video.camera import Camera
from tests.dino.video.fake_camera import FakeCamera


def camera(fake, **settings):
    return Camera(0, capture=lambda device: fake, clock=lambda: 50 + fake.given * 0.04, **settings)


def test_a_camera_gives_rgb_at_the_times_of_the_clock_until_its_end():
    with camera(fake := FakeCamera(), end=0.2) as source:
        frames = list(source)
    assert [int(frame.pixels[0, 0, 2]) for frame in frames] == [2, 3, 4, 5, 6]
    assert [frame.time for frame in frames] == [Fraction(n, 25) for n in range(5)]
    assert frames[-1].time + frames[-1].duration == Fraction(1, 5) and frames[0].pixels[..., :2].max() == 0
    assert fake.released and not source.repeatable and source.size == (4, 6)
    assert source.length is None and source.damage == ""


def test_what_comes_before_the_start_is_left_out():
    with camera(FakeCamera(), start=0.1, end=0.3) as source:
        frames = list(source)
    assert [int(frame.pixels[0, 0, 2]) for frame in frames] == [5, 6, 7, 8, 9]
    assert [frame.time for frame in frames] == [Fraction(n, 25) for n in range(5)]


def test_frames_that_come_at_one_tick_of_the_clock_follow_each_other():
    with Camera(0, capture=lambda device: FakeCamera(9), clock=lambda: 7.0) as source:
        frames = list(source)
    assert len(frames) == 8 and all(one.time < other.time for one, other in pairwise(frames))
    assert all(frame.duration > 0 for frame in frames)


def test_the_first_interrupt_ends_a_camera_gently_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    fake = FakeCamera(on_read=lambda given: given == 5 and signal.raise_signal(signal.SIGINT))
    with camera(fake) as source:
        assert sum(1 for _ in source) == 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and source.damage == ""


def test_a_camera_that_is_missing_or_stops_is_told(capfd):
    with pytest.raises(UserError, match="camera 0 gives no picture"):
        camera(FakeCamera(0))
    with contextlib.closing(camera(FakeCamera(3))) as source:
        assert sum(1 for _ in source) == 2 and "camera 0 stopped" in source.damage
    with pytest.raises(UserError, match="camera 97 gives no picture"):
        Camera("97")
    assert capfd.readouterr() == ("", "")
