"""Packed names against a plain list."""

import pickle
import tracemalloc

import numpy as np
import pytest

from dino.runtime.names import Names, Packing

ODD = ["", "a.png", "ü/日本.png", "caf\udce9.png", "\ud800", "two\nlines", "", "null\0", "x" * 70_000]


@pytest.mark.parametrize("names", [[], [""], ["one"], ODD, ODD * 50], ids=len)
def test_packed_names_are_a_sequence_of_the_same_names(names):
    packed = Names.of(iter(names))
    assert len(packed) == len(names)
    assert list(packed) == names
    assert [packed[index] for index in range(len(names))] == names
    assert [packed[index] for index in np.arange(len(names))] == names
    assert [packed[index - len(names)] for index in range(len(names))] == names
    assert list(reversed(packed)) == names[::-1]
    for place in (slice(None), slice(1, -1), slice(None, None, -3), slice(5, 2)):
        assert list(packed[place]) == names[place]
    for copy in (pickle.loads(pickle.dumps(packed)), Names.from_arrays(packed.arrays())):
        assert list(copy) == names


@pytest.mark.parametrize("index", [3, -4, 2**40])
def test_a_place_beyond_the_ends_is_refused(index):
    with pytest.raises(IndexError):
        Names.of(["a", "b", "c"])[index]


def test_names_taken_early_stay_when_more_are_packed():
    packing = Packing()
    packing.add("a")
    early = packing.names()
    packing.add("b")
    assert (list(early), list(packing.names()), len(packing)) == (["a"], ["a", "b"], 2)


def test_a_name_costs_its_characters_and_its_end():
    count = 50_000
    tracemalloc.start()
    try:
        names = Names.of(f"n{index % 1000:08d}/{index:012d}.JPEG" for index in range(count))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    characters = len(names[0])
    assert kept < count * (characters + 8) * 1.01
    assert len(pickle.dumps(names, protocol=5)) < count * (characters + 8) * 1.01
