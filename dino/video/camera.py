"""The frames of a camera as they come."""

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import cv2

from dino.runtime.options import UserError
from dino.video.clip import Clip, Moment, Span

# Seconds that the next frame comes later at least.
_LEAST_INTERVAL = Fraction(1, 1_000_000)


class Camera(Clip):
    """A camera's frames, each with the time at which it came, until `end` or until it is stopped.

    Inside its `with`, the first Ctrl-C ends the iteration after the present frame, so that what was drawn is
    finished; the second interrupts.

    Args:
        device: its number, a device such as /dev/video0, or an address that OpenCV opens.
        start, end: seconds from its first frame; None goes on until `close` or Ctrl-C.
        stride: take every n-th frame.
        capture: makes the capture object, in place of `cv2.VideoCapture`.
        clock: seconds, in place of the system's.

    Raises:
        UserError: there is no such camera, or it gives no picture.
    """

    repeatable = False

    def __init__(
        self,
        device: int | str = 0,
        *,
        start: float = 0.0,
        end: float | None = None,
        stride: int = 1,
        capture: Callable[[int | str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        device = int(device) if str(device).isdecimal() else device
        self._span = Span.of(start, end, stride)
        self._clock = clock
        self._stopped = False
        self._before: Any = None
        self._in_use = threading.Lock()  # OpenCV crashes when a camera is released while it is read
        self.name = f"camera {device}"
        with _quiet_opencv():
            self._capture = (capture or cv2.VideoCapture)(device)
            pixels = self._capture.read()[1] if self._capture.isOpened() else None
        if pixels is None:
            self.close()
            raise UserError(
                f"{self.name} gives no picture: there is none, or another program uses it; cameras count from 0"
            )
        self.size = pixels.shape[:2]
        told = self._capture.get(cv2.CAP_PROP_FPS)
        self._rate = Fraction(told).limit_denominator(1001) if 1 <= told <= 500 else Fraction(30)
        self.rate = self._rate / stride

    def __enter__(self) -> "Camera":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()
        self.close()

    def close(self) -> None:
        """End the iteration and let go of the camera."""
        self._stopped = True
        with self._in_use:
            self._capture.release()

    def _interrupted(self, *_signal: object) -> None:
        self._stopped = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _moments(self) -> Generator[Moment, None, None]:
        begin: float | None = None
        at = -_LEAST_INTERVAL
        while True:
            with self._in_use:
                if self._stopped:
                    return
                good, pixels = self._capture.read()
            now = self._clock()
            if not good:
                self.damage = f"{self.name} stopped giving pictures; what came before is drawn"
                return
            begin = now if begin is None else begin
            # Two frames of a buffer may come within one tick of the clock.
            at = max(Fraction(round((now - begin) * 1_000_000), 1_000_000), at + _LEAST_INTERVAL)
            yield Moment(at, 1 / self._rate, partial(cv2.cvtColor, pixels, cv2.COLOR_BGR2RGB))


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Without OpenCV's own lines about a missing camera."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
