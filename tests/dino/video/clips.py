"""Clips for tests: written by the writer, and read back by others."""

from fractions import Fraction

import av
import cv2
import numpy as np

from dino.video.writer import VideoWriter


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
