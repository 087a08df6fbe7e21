"""A feed in one process; what several tell each other is tried in test_faults.py and tests/test_faults.py."""

import signal
import time
from functools import partial

import pytest
import torch

from dino.feed import Feed
from dino.loader import create_loader, joined
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted, UserError
from tests.dino.test_loader import Colours, epoch_order, levels, noisy


def create_feed(pictures, interruption=None, *, max_broken=-1, transform=noisy):
    said = []
    open_loader = partial(create_loader, pictures, transform, enough=8, num_workers=0, pin_memory=False)
    feed = Feed(
        open_loader,
        interruption or Interruption(),
        join=joined,
        max_broken=max_broken,
        num_workers=0,
        say=said.append,
    )
    return feed, said


def test_a_batch_comes_for_each_step_whatever_its_parts():
    feed, said = create_feed(Colours(8))
    whole = list(feed.batches(epoch_order(8, batch=4, epochs=2)))
    parts = list(feed.batches(epoch_order(8, batch=4, epochs=2, parts=2)))
    assert len(whole) == len(parts) == 4 and said == []
    for one, other in zip(whole, parts, strict=True):
        assert levels(one) == levels(other)
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


def test_a_signal_ends_it_before_the_next_step():
    with Interruption() as interruption:
        feed, _ = create_feed(Colours(8), interruption)
        batches = feed.batches(epoch_order(8, batch=2))
        next(batches)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Interrupted, match=r"^SIGUSR1$"):
            next(batches)


def test_broken_pictures_are_named_once_and_end_it_when_they_are_too_many():
    feed, said = create_feed(Colours(6, broken={1}), max_broken=1)
    assert len(list(feed.batches(epoch_order(6, epochs=2)))) == 6
    assert said == ["broken picture skipped: 1.png: empty file"]
    feed, said = create_feed(Colours(6, broken={1, 4}), max_broken=1)
    with pytest.raises(UserError, match="2 broken pictures, --max_broken allows 1"):
        list(feed.batches(epoch_order(6)))


def test_a_step_without_any_readable_picture_ends_it():
    feed, _ = create_feed(Colours(4, broken=range(4)))
    with pytest.raises(UserError, match="no readable picture is left for a step: see the list above"):
        list(feed.batches(epoch_order(4)))


def test_long_waits_for_pictures_are_told_once_and_short_ones_never():
    def slow(picture):
        time.sleep(0.02)
        return noisy(picture)

    feed, _ = create_feed(Colours(4), transform=slow)
    list(feed.batches(epoch_order(4, epochs=1)))
    assert 0.08 <= feed.waited < 5
    assert feed.long_waits(feed.waited) == []  # too short to matter
    feed.waited = 40.0
    assert feed.long_waits(200.0) == []
    (line,) = feed.long_waits(100.0)
    assert line.startswith(
        "waiting for pictures takes 40% of the time, with 0 loading processes: give more cores"
    )
    assert feed.long_waits(100.0) == []
