"""Threads that must never hang, lose an item or outlive the block."""

import threading
import time

import pytest

from dino.runtime.ahead import Ahead, Stopwatch


def test_items_come_in_order_and_all_of_them():
    with Ahead(range(100), depth=3) as items:
        assert list(items) == list(range(100))
    with Ahead([]) as none:
        assert list(none) == []


def test_it_works_ahead_but_not_further_than_asked():
    made: list[int] = []
    five = threading.Event()

    def numbers():
        for number in range(50):
            made.append(number)
            if len(made) == 5:
                five.set()
            yield number

    with Ahead(numbers(), depth=4) as items:
        assert five.wait(10), "four in the queue and one in hand"
        time.sleep(0.05)
        assert len(made) == 5
        assert next(iter(items)) == 0


def test_two_stages_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=10)

    def makes():
        for number in range(3):
            meeting.wait()
            yield number

    with Ahead(makes(), depth=3) as items:
        for _ in range(3):
            meeting.wait()  # passes only while the other stage is at work
        assert list(items) == [0, 1, 2]


def test_an_error_arrives_after_the_items_before_it():
    def breaks():
        yield 1
        raise OSError("disk")

    taken = []
    with pytest.raises(OSError, match="disk"), Ahead(breaks()) as items:
        taken.extend(items)
    assert taken == [1]
    with Ahead(breaks()) as items:
        assert next(iter(items)) == 1


class NoIterator:
    def __iter__(self):
        raise OSError("disk")


def breaks_at_its_end():
    try:
        yield 1
    finally:
        raise OSError("disk")


def test_an_error_at_either_end_of_the_items_arrives_too():
    for items, expected in ((NoIterator(), []), (breaks_at_its_end(), [1])):
        taken = []
        with pytest.raises(OSError, match="disk"), Ahead(items) as ahead:
            taken.extend(ahead)
        assert taken == expected


def test_who_asks_again_after_the_end_gets_the_end_again():
    with Ahead(range(3)) as items:
        assert list(items) == [0, 1, 2] and list(items) == []


def endless(closed):
    try:
        while True:
            yield 0
    finally:
        closed.set()


def test_leaving_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Ahead(endless(closed)) as items:
        for _ in items:
            raise KeyboardInterrupt
    assert closed.is_set() and threading.active_count() == before


def test_leaving_early_closes_what_is_behind_the_stopwatch():
    closed = threading.Event()

    kept = endless(closed)
    with Ahead(Stopwatch().items("made", kept)) as items:
        assert next(iter(items)) == 0
    assert closed.is_set()


def test_the_stopwatch_counts_work_and_not_waiting():
    watch = Stopwatch()

    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    for _ in watch.items("made", slow()):
        time.sleep(0.05)
    assert watch.call("called", lambda: 7) == 7
    assert 0.06 <= watch.seconds["made"] < 0.15
    assert set(watch.seconds) == {"made", "called"}
