"""Frames through the whole line, with a network of a few sums instead of the real one."""

import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from dino.attention.drawing import Look
from dino.attention.film import Film, LayerStore, Painter, film
from dino.attention.layout import Layout
from dino.attention.render import heat_patches, normalize
from dino.attention.scale import ClipScale, PictureScale, RunningScale
from dino.runtime.options import UserError
from dino.video.clip import Frame

ROWS, COLS, PATCH = 48, 64, 8


def frame(index: int) -> Frame:
    """Grey, with a bright square that moves and brightens."""
    pixels = np.full((ROWS, COLS, 3), 30, np.uint8)
    left = 8 * (index % 8)
    pixels[16:32, left : left + 8] = 60 + 15 * (index % 8)
    return Frame(pixels, Fraction(index, 10), Fraction(1, 10))


class Frames:
    """A source of `count` frames."""

    name, size, rate = "frames", (ROWS, COLS), Fraction(10)

    def __init__(self, count: int, *, repeatable: bool = True, fails_at: int = -1, interrupted_at: int = -1):
        self.length, self.repeatable, self.damage = count, repeatable, ""
        self.fails_at, self.interrupted_at = fails_at, interrupted_at
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
        np.testing.assert_array_equal(found, expected)
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


@pytest.mark.parametrize("repeatable", [True, False])
def test_ctrl_c_ends_a_cameras_film_and_leaves_none_of_a_file(tmp_path: Path, monkeypatch, repeatable: bool):
    from dino.attention import film as video

    class Writer(video.VideoWriter):
        count = 0

        def write(self, *frame):
            self.count += 1
            if self.count == 4:
                raise KeyboardInterrupt
            super().write(*frame)

    monkeypatch.setattr(video, "VideoWriter", Writer)
    source = Frames(1000, repeatable=repeatable)
    if repeatable:
        with pytest.raises(KeyboardInterrupt):
            film(source, brightness, [heat_film(tmp_path / "a.mp4")], scale=PictureScale())
        assert list(tmp_path.iterdir()) == []
    else:
        report = film(source, brightness, [heat_film(tmp_path / "a.mp4")], scale=PictureScale())
        assert report.frames == 3 == len(read(tmp_path / "a.mp4"))
    assert source.given < 100


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


def test_layers_come_back_from_the_store_as_they_went_in(tmp_path: Path):
    random = np.random.default_rng(0)
    frames = [
        {
            "mean": random.random((3, 4), np.float32),
            "pca": random.integers(0, 256, (3, 4, 3)).astype(np.float32),
        }
        for _ in range(5)
    ]
    with LayerStore(tmp_path) as store:
        for layers in frames:
            store.append(layers)
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        for _ in range(2):
            for found, expected in zip(store, frames, strict=True):
                assert found.keys() == expected.keys()
                for name, layer in expected.items():
                    np.testing.assert_array_equal(found[name], layer)
