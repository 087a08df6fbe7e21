"""Batches on their way to the device; the streams of a GPU are played, the GPU itself is in test_gpu.py."""

from contextlib import contextmanager

import pytest
import torch

from dino.loader import Batch
from dino.prefetch import Prefetch
from dino.runtime.options import Interrupted, UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def batches(count, told, problem=None):
    for number in range(count):
        told.append(f"load {number}")
        yield Batch([torch.full((1, 3, 2, 2), float(number))], [])
    if problem is not None:
        raise problem


def views_of(batch):
    return batch.views


class View:
    """Notes who uses it."""

    def __init__(self, number, told):
        self.number, self.told = number, told

    def record_stream(self, stream):
        self.told.append(f"{stream.name} uses {self.number}")


class PlayedStream:
    def __init__(self, name, told):
        self.name, self.told = name, told

    def record_event(self):
        return self

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for {event.name}")


@pytest.fixture
def gpu(monkeypatch):
    """What happens on a played GPU, in order, and a way to prepare batches there."""
    told = []
    current = [PlayedStream("main", told)]

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def prepare(batch):
        number = int(batch.views[0][0, 0, 0, 0])
        told.append(f"{current[-1].name} prepares {number}")
        return [View(number, told)]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: PlayedStream("side", told))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    return told, prepare


def test_on_a_cpu_the_views_come_as_they_are_and_none_is_loaded_before_it_is_asked_for():
    told = []
    views = iter(Prefetch(batches(3, told), CPU, views_of))
    assert [v.unique().tolist() for v in next(views)] == [[0.0]]
    assert told == ["load 0"]
    assert [each[0].unique().item() for each in views] == [1.0, 2.0]


def test_views_are_what_the_batch_is_prepared_to():
    prepared = Prefetch(batches(2, []), CPU, lambda batch: [view + 1 for view in batch.views] * 2)
    assert [[view.mean().item() for view in views] for views in prepared] == [[1.0, 1.0], [2.0, 2.0]]


def test_on_a_gpu_the_next_views_are_under_way_before_a_step_has_its_own(gpu):
    told, prepare = gpu
    for (view,) in Prefetch(batches(3, told), CUDA, prepare):
        told.append(f"step {view.number}")
    steps = [
        *("load 0", "side prepares 0", "load 1", "side prepares 1"),
        *("main waits for side", "main uses 0", "step 0"),
        *("load 2", "side prepares 2", "main waits for side", "main uses 1", "step 1"),
        *("main waits for side", "main uses 2", "step 2"),
    ]
    assert told == steps


def test_nothing_comes_of_no_batch(gpu):
    assert list(Prefetch([], CUDA, gpu[1])) == list(Prefetch([], CPU, views_of)) == []


@pytest.mark.parametrize("problem", [UserError("too many"), Interrupted("SIGTERM")])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_what_stops_the_batches_comes_after_those_before_it(problem, device, gpu):
    told, prepare = gpu
    views = iter(Prefetch(batches(2, told, problem), device, prepare))
    assert [next(views)[0].number for _ in range(2)] == [0, 1]
    with pytest.raises(type(problem), match=str(problem)):
        next(views)
