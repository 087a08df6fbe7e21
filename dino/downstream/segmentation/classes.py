"""The classes of a segmentation: which number in a mask file is which class, and what each is called.

A class has an id, its number in mask files, and a place from 0, its number in the network. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino.runtime.options import UserError

PlaceArray = NDArray[np.int16]

VOID = -1  # place of the pixels that count for no class

NAMES_FILE = "classes.txt"

# Numbers in a mask beyond this belong to instances or colours, not to classes.
HIGHEST_ID = 65535
_MOST = 4096  # classes
_UNKNOWN = -2


@dataclass(frozen=True)
class Classes:
    """Ids and names of K classes, in the order of their places, and the ids that count for none.

    Raises:
        UserError: no class, or too many.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    ignored: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 1 <= len(self.ids) <= _MOST:
            raise UserError(
                f"there are {len(self.ids)} classes, of 1 to {_MOST} that are allowed; masks hold a number for each "
                "class, not for each object"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def numbered(cls, count: int, ignored: frozenset[int] = frozenset()) -> "Classes":
        """The first `count` ids from 0 that are not ignored, named by them."""
        ids: list[int] = []
        number = 0
        while len(ids) < count:
            if number not in ignored:
                ids.append(number)
            number += 1
        return cls.named({number: "" for number in ids}, ignored)

    @classmethod
    def named(cls, names: Mapping[int, str], ignored: frozenset[int] = frozenset()) -> "Classes":
        """Of names by id; those that are ignored are left out, and an empty name is the id."""
        ids = tuple(sorted(set(names) - ignored))
        return cls(ids, tuple(names[number] or f"class {number}" for number in ids), ignored)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Classes":
        """What `plain` has made."""
        return cls(tuple(plain["ids"]), tuple(plain["names"]), frozenset(plain["ignored"]))

    def plain(self) -> dict[str, Any]:
        """As plain values, for files."""
        return {"ids": list(self.ids), "names": list(self.names), "ignored": sorted(self.ignored)}

    def places(self, ids: NDArray[Any]) -> PlaceArray:
        """Ids, of any shape, to places; ignored ones to `VOID`.

        Raises:
            UnknownIdError: an id is neither a class's nor ignored.
        """
        clipped = np.clip(ids, -1, HIGHEST_ID + 1).astype(np.int64)
        found = self._place_of_id[clipped]
        if (found == _UNKNOWN).any():
            raise UnknownIdError(int(np.asarray(ids)[found == _UNKNOWN].flat[0]))
        return found

    def ids_of(self, places: NDArray[Any]) -> NDArray[np.uint16]:
        """Places in [0, K), of any shape, to ids."""
        return np.asarray(self.ids, np.uint16)[places]

    def described(self) -> str:
        """The ids in words, for messages."""
        consecutive = self.ids == tuple(range(self.ids[0], self.ids[0] + len(self)))
        if len(self) == 1 or not consecutive:
            return ", ".join(map(str, self.ids[:8])) + (", ..." if len(self) > 8 else "")
        return f"{self.ids[0]} to {self.ids[-1]}"

    @cached_property
    def _place_of_id(self) -> PlaceArray:
        """By id; the last two are for what is beyond the highest, and below 0."""
        table = np.full(HIGHEST_ID + 3, _UNKNOWN, np.int16)
        table[list(self.ids)] = np.arange(len(self.ids))
        table[[number for number in self.ignored if number <= HIGHEST_ID]] = VOID
        return table


class UnknownIdError(ValueError):
    """A number in a mask that is no class's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def read_class_names(file: Path) -> dict[int, str]:
    """Names by id, of a file with `id<TAB>name` in each line.

    Raises:
        UserError: a line is something else, an id comes twice, or there are none.
    """
    names: dict[int, str] = {}
    for number, line in enumerate(_lines(file), 1):
        written, _, name = line.partition("\t")
        if not written.strip():
            continue
        if not written.strip().isdecimal() or int(written) > HIGHEST_ID:
            raise UserError(
                f"{file}, line {number}: '{line[:40]}' is no id of 0 to {HIGHEST_ID}, a tab and a name"
            )
        if int(written) in names:
            raise UserError(
                f"{file}, line {number}: id {int(written)} has a name already, '{names[int(written)]}'"
            )
        names[int(written)] = " ".join(name.split())
    if not names:
        raise UserError(f"{file} names no classes: it takes an id, a tab and a name in each line")
    return names


def read_ade_names(file: Path) -> dict[int, str]:
    """Names by id, of ADE20k's table `objectInfo150.txt`: a heading, and the id first and the name last in a line.

    Raises:
        UserError: it is another table.
    """
    rows = [line.split("\t") for line in _lines(file)[1:] if line.strip()]
    if not rows or not all(len(row) > 1 and row[0].strip().isdecimal() for row in rows):
        raise UserError(
            f"{file} is not ADE20k's table of names; name the number of classes with --num_classes"
        )
    return {int(row[0]): row[-1].split(",")[0].strip() for row in rows}


def check_same(known: Classes, of_data: Classes, source: str, *, certain: bool = True) -> None:
    """Refuse data whose classes are not those that a network was trained on.

    Args:
        certain: whether the network's ids are known, and not its number of classes alone.

    Raises:
        UserError: their number, or an id, differs.
    """
    if len(known) != len(of_data):
        raise UserError(
            f"{source} is for {len(known)} classes, the data has {len(of_data)}; --ignore and --num_classes say "
            "which count"
        )
    if certain and known.ids != of_data.ids:
        raise UserError(
            f"{source} is for the classes {known.described()}, and the data has {of_data.described()}; --ignore says "
            "which do not count"
        )


def listed(names: Sequence[str], most: int = 3) -> str:
    """Some of them, for messages."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8: {error}") from error
