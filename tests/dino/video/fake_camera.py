"""A camera for tests, in place of `cv2.VideoCapture`."""

import numpy as np


class FakeCamera:
    """Level n in the blue channel of the n-th picture; none after `count`."""

    def __init__(self, count=1000, *, size=(4, 6), on_read=None):
        self.count, self.size, self.on_read = count, size, on_read
        self.given, self.released = 0, False

    def isOpened(self):  # noqa: N802 - OpenCV's name
        return self.count > 0

    def read(self):
        if self.on_read:
            self.on_read(self.given)
        if self.given == self.count:
            return False, None
        self.given += 1
        pixels = np.zeros((*self.size, 3), np.uint8)
        pixels[..., 0] = self.given % 256
        return True, pixels

    def get(self, _property):
        return 29.97

    def release(self):
        self.released = True
