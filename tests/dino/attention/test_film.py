"""Frames through the whole line, with a network of a few sums instead of the real one."""

import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from dino.attention.drawing import Look
from dino.attention.film import Film, Painter, film
from dino.attention.layout import Layout
from dino.attention.render import heat_patches, normalize
from dino.attention.scale import ClipScale, PictureScale, RunningScale
from dino.runtime.options import UserError
from dino.video.clip import Frame
from dino.video.writer import VideoWriter
from tests.full_disk import full_disk

ROWS, COLS, PATCH = 48, 64, 8


def frame(index: int) -> Frame:
    """Grey, with a bright square that moves and brightens."""
    pixels = np.full((ROWS, COLS, 3), 30, np.uint8)
    left = 8 * (index % 8)
    pixels[16:32, left : left + 8] = 60 + 15 * (index % 8)
    return Frame(pixels, Fraction(index, 10), Fraction(1, 10))


class Frames:
    """A source of `count` frames."""

    name, size, rate, begins, repeatable = "frames", (ROWS, COLS), Fraction(10), Fraction(0), True

    def __init__(self, count: int, *, fails_at: int = -1):
        self.length, self.damage, self.fails_at = count, "", fails_at
        self.given = 0

    def __iter__(self):
        for index in range(self.length):
            if index == self.fails_at:
                raise UserError("the source broke")
            self.given += 1
            yield frame(index)
        self.damage = "frames ends early"


def brightness(images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Mean brightness of each patch, less the ground's."""
    patches = images.reshape(len(images), ROWS // PATCH, PATCH, COLS // PATCH, PATCH, 3)
    return [{"mean": layer} for layer in patches.mean(axis=(2, 4, 5), dtype=np.float32) - 30]


def heat_film(path: Path) -> Film:
    layout = Layout([""], (ROWS, COLS))
    return Film(path, Painter(Look(PATCH), "heat", ("mean",), False, layout))


def read(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(each.time, each.to_ndarray(format="rgb24")) for each in container.decode(video=0)]


@pytest.mark.parametrize("scale", [ClipScale((0, 100)), RunningScale((0, 100)), PictureScale()])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_frame_is_drawn_once_at_its_time(tmp_path: Path, scale, batch: int):
    report = film(Frames(10), brightness, [heat_film(tmp_path / "a.mp4")], scale=scale, batch=batch)
    times = [time for time, _ in read(tmp_path / "a.mp4")]
    assert times == pytest.approx([index / 10 for index in range(10)], abs=1e-4)
    assert (report.frames, report.duration) == (10, 1.0)
    assert set(report.seconds) == {"decode", "model", "render", "encode"}
    assert report.damage == ["frames ends early"]


def test_frames_hold_their_own_attention_on_the_clips_scale(tmp_path: Path):
    film(Frames(8), brightness, [heat_film(tmp_path / "a.mp4")], scale=ClipScale((0, 100)))
    largest = max(float(brightness(frame(index).pixels[None])[0]["mean"].max()) for index in range(8))
    for index, (_, found) in enumerate(read(tmp_path / "a.mp4")):
        values = normalize(brightness(frame(index).pixels[None])[0]["mean"], limits=(0, largest))
        expected = heat_patches(values, PATCH, (ROWS, COLS))
        inside = found[20:28, 8 * index + 2 : 8 * index + 6].reshape(-1, 3).mean(axis=0)
        np.testing.assert_allclose(inside, expected[20, 8 * index + 4], atol=14)


def test_the_network_sees_each_frame_once_though_it_takes_two_passes(tmp_path: Path):
    seen = []

    def counting(images):
        seen.extend(len(image) for image in images)
        return brightness(images)

    source = Frames(9)
    film(source, counting, [heat_film(tmp_path / "a.mp4")], scale=ClipScale((0, 99)), batch=2)
    assert len(seen) == 9 and source.given == 18


def test_several_films_of_one_pass_agree_with_those_made_alone(tmp_path: Path):
    grid = Layout(["picture", "mean"], (ROWS, COLS))
    beside = Film(tmp_path / "b.mp4", Painter(Look(PATCH), "heat", ("mean",), True, grid))
    film(Frames(5), brightness, [heat_film(tmp_path / "a.mp4"), beside], scale=PictureScale())
    film(Frames(5), brightness, [heat_film(tmp_path / "alone.mp4")], scale=PictureScale())
    for (_, found), (_, expected) in zip(read(tmp_path / "a.mp4"), read(tmp_path / "alone.mp4"), strict=True):
        # x264 does not code the same frames alike every time.
        assert np.abs(found.astype(int) - expected).mean() < 1
    assert read(tmp_path / "b.mp4")[0][1].shape[1] > 2 * COLS


@pytest.mark.parametrize("scale", [ClipScale((0, 100)), PictureScale()])
def test_after_an_error_nothing_is_left_and_no_thread_runs(tmp_path: Path, scale):
    threads = threading.active_count()
    with pytest.raises(UserError, match="the source broke"):
        film(Frames(9, fails_at=6), brightness, [heat_film(tmp_path / "a.mp4")], scale=scale)

    def fails(images):
        raise RuntimeError("the network broke")

    with pytest.raises(RuntimeError, match="the network broke"):
        film(Frames(9), fails, [heat_film(tmp_path / "a.mp4")], scale=scale)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize("stage", ["see", "encode"])
def test_ctrl_c_leaves_no_thread_and_no_file_in_either_pass(tmp_path: Path, monkeypatch, stage: str):
    class Interrupted(ClipScale):
        def see(self, layers):
            if stage == "see":
                raise KeyboardInterrupt
            super().see(layers)

    def write(*frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "write", write)
    threads, source = threading.active_count(), Frames(50)
    with pytest.raises(KeyboardInterrupt) as kept:
        film(source, brightness, [heat_film(tmp_path / "a.mp4")], scale=Interrupted((0, 100)))
    assert threading.active_count() == threads and source.given < (20 if stage == "see" else 70)
    assert list(tmp_path.iterdir()) == []
    del kept  # holds the frames of the stack, and so everything in them


@pytest.mark.parametrize("limit", [1000, 100_000])
def test_a_disk_too_small_for_the_maps_is_one_sentence_and_no_thread_is_left(tmp_path: Path, limit: int):
    threads = threading.active_count()
    with (
        full_disk(limit),
        pytest.raises(UserError, match=r"cannot keep the maps .*--normalize running") as kept,
    ):
        film(Frames(2000), brightness, [heat_film(tmp_path / "a.mp4")], scale=ClipScale((0, 100)))
    assert threading.active_count() == threads and list(tmp_path.iterdir()) == []
    assert "\n" not in str(kept.value)


@pytest.mark.parametrize("second", [range(9), range(11), [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]])
def test_a_source_that_changes_between_the_passes_is_told_and_not_drawn_with_wrong_maps(
    tmp_path: Path, second
):
    passes = [range(10), second]

    class Changing(Frames):
        def __iter__(self):
            yield from map(frame, passes.pop(0))

    with pytest.raises(UserError, match="frames changed while it was drawn"):
        film(Changing(10), brightness, [heat_film(tmp_path / "a.mp4")], scale=ClipScale((0, 100)))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_the_network_looks(tmp_path: Path):
    (tmp_path / "a" / "thesis").mkdir(parents=True)
    pictures = replace(heat_film(tmp_path / "a"), format="png")
    with pytest.raises(UserError, match="holds other files, such as thesis"):
        film(source := Frames(5), brightness, [pictures], scale=ClipScale((0, 100)))
    assert source.given == 0


def test_only_layers_that_are_drawn_are_kept_and_scaled(tmp_path: Path):
    class Scale(PictureScale):
        def __call__(self, layers, seconds=0.0):
            scaled.append(set(layers))
            return super().__call__(layers, seconds)

    def layers(images):
        return [{**each, "max": each["mean"], "head0": each["mean"]} for each in brightness(images)]

    scaled: list[set[str]] = []
    film(Frames(2), layers, [heat_film(tmp_path / "a.mp4")], scale=Scale())
    colors = replace(heat_film(tmp_path / "b.mp4").painter, style="colors", names=("colors",))
    film(Frames(2), layers, [Film(tmp_path / "b.mp4", colors)], scale=Scale())
    assert scaled == [{"mean"}] * 2 + [{"mean", "max", "head0"}] * 2


@pytest.mark.parametrize("labels", [[""], ["picture", "mean"]])
def test_a_cut_out_stands_on_the_ground_of_the_layout(tmp_path: Path, labels: list[str]):
    layout = Layout(labels, (ROWS, COLS))
    painter = Painter(Look(PATCH, threshold=1.0), "cutout", ("mean",), len(labels) > 1, layout)
    film(Frames(8), brightness, [Film(tmp_path / "a.mp4", painter)], scale=PictureScale())
    for index, (_, found) in enumerate(read(tmp_path / "a.mp4")):
        panel = found[-ROWS:, -COLS:].astype(int)
        np.testing.assert_allclose(panel[20:28, 8 * index + 2 : 8 * index + 6], 60 + 15 * index, atol=6)
        assert panel[:14].max() < 25 and panel[34:].max() < 25


def test_only_a_few_frames_are_held_at_a_time(tmp_path: Path):
    """However slow the end of the line is."""
    held, most = [0], [0]

    class Counted(Frames):
        def __iter__(self):
            for each in super().__iter__():
                held[0] += 1
                most[0] = max(most[0], held[0])
                yield each

    class Slow(Painter):
        def __call__(self, picture):
            held[0] -= 1
            return super().__call__(picture)

    slow = Slow(Look(PATCH), "heat", ("mean",), False, Layout([""], (ROWS, COLS)))
    film(Counted(200), brightness, [Film(tmp_path / "a.mp4", slow)], scale=PictureScale())
    assert 1 <= most[0] <= 20
