"""Stages of a stream that work at the same time: each in a thread of its own, a few items ahead of the next."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END = object()


class Ahead(Generic[Item]):
    """Iterates over `items` in a thread, at most `depth` of them ahead of who takes them.

    An exception of `items` is raised where the items are taken. A context manager: whatever happens in it, the
    thread has ended when it is left, and the iterator has been closed.
    """

    def __init__(self, items: Iterable[Item], depth: int = 2) -> None:
        self._items = items
        self._queue: queue.Queue[object] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Ahead[Item]":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            self._take_all()
            self._thread.join(timeout=0.05)

    def __iter__(self) -> Iterator[Item]:
        while (item := self._queue.get()) is not _END:
            yield item  # type: ignore[misc]  # the queue holds items and the end
        self._queue.put(_END)  # for whoever asks again
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            with _closed_after(self._items) as iterator:
                for item in iterator:
                    if not self._put(item):
                        break
        except BaseException as error:  # goes on in the thread that waits for the items
            self._error = error
        finally:
            self._put(_END)

    def _put(self, item: object) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _take_all(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()


class Stopwatch:
    """Seconds that each stage of a stream has worked, waiting for other stages not counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def items(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items, the time that each takes to come counted for the stage."""
        with _closed_after(items) as iterator:
            while True:
                began = time.perf_counter()
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                finally:
                    self.add(stage, time.perf_counter() - began)
                yield item

    def call(self, stage: str, work: Callable[..., Result], *arguments: object) -> Result:
        """The result of `work(*arguments)`, its time counted for the stage."""
        began = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            self.add(stage, time.perf_counter() - began)


@contextmanager
def _closed_after(items: Iterable[Item]) -> Iterator[Iterator[Item]]:
    """An iterator over the items; one that holds something, as a generator does, lets go of it at the end."""
    iterator = iter(items)
    try:
        yield iterator
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
