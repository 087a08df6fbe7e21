"""A million names in two blocks of memory, which forked processes share and spawned ones get in one piece.

A list holds an object for each name. Whoever reads it counts references inside of them, so that every worker of a
DataLoader copies the whole of it, page by page, as its epochs go on.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np

_EVERY_STRING = ("utf-8", "surrogatepass")  # also the names of files that are not text


class Names(Sequence[str]):
    """An immutable sequence of any strings.

    Args:
        characters: of all names one after the other, as `Packing` encodes them.
        ends: (n + 1,) int64, where each name begins and the last one ends.
    """

    def __init__(self, characters: bytes, ends: np.ndarray[Any, Any]) -> None:
        self._characters = characters
        self._ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """The names, taken one at a time."""
        packing = Packing()
        for name in names:
            packing.add(name)
        return packing.names()

    @classmethod
    def from_arrays(cls, arrays: Sequence[np.ndarray[Any, Any]]) -> "Names":
        """What `arrays` gave."""
        characters, ends = arrays
        return cls(characters.tobytes(), ends)

    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """For a file: the characters (uint8) and where names end (int64)."""
        return np.frombuffer(self._characters, np.uint8), self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Names": ...

    def __getitem__(self, index: int | slice) -> "str | Names":
        if isinstance(index, slice):
            return Names.of(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        return self._characters[self._ends[place] : self._ends[place + 1]].decode(*_EVERY_STRING)

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends.data):
            yield self._characters[start:end].decode(*_EVERY_STRING)


class Packing:
    """Names while they are found."""

    def __init__(self) -> None:
        self._characters = bytearray()
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, name: str) -> None:
        self._characters += name.encode(*_EVERY_STRING)
        self._ends.append(len(self._characters))

    def names(self) -> Names:
        """All that were added."""
        return Names(bytes(self._characters), np.array(self._ends, np.int64))
