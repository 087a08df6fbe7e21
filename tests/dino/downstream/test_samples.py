import random

import numpy as np
import pytest
import torch

from dino.downstream.samples import Batch, Samples, create_loader, drawing
from dino.loader import EpochOrder
from dino.runtime.images import BrokenImageError


def drawn(index):
    """Numbers from all three generators."""
    return index, torch.rand(1).item(), np.random.random(), random.random()


def broken_at(*places):
    def read(index):
        if index in places:
            raise BrokenImageError(f"{index}.png", "empty file")
        return drawn(index)

    return read


def batches(read, count, num_workers=0, **order):
    order = EpochOrder(count, **{"global_batch": 2, "epochs": 1, "seed": 3, **order})
    samples = Samples(count, read, seed=3)
    return list(create_loader(samples, list, order, num_workers=num_workers, pin_memory=False))


def test_draws_depend_on_seed_epoch_and_picture_alone():
    samples = Samples(4, drawn, seed=3)
    first, _ = samples[0, 1]
    torch.rand(5), np.random.random(5), random.random()
    again, _ = samples[0, 1]
    assert first == again
    others = [samples[1, 1][0], samples[0, 2][0], Samples(4, drawn, seed=4)[0, 1][0]]
    assert all(first[part] != other[part] for other in others for part in (1, 2, 3))


def test_nobody_notices_the_draws():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with drawing(7):
        drawn(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    with pytest.raises(KeyError), drawing(7):
        random.random()
        raise KeyError
    assert random.getstate() == before[2]


def test_the_next_readable_picture_stands_in_for_a_broken_one_which_is_named():
    sample, broken = Samples(4, broken_at(1, 2), seed=0)[0, 1]
    assert sample[0] == 3
    assert broken == [("1.png", "empty file"), ("2.png", "empty file")]
    assert sample[1:] != drawn_with_seed_of(3)


def drawn_with_seed_of(index):
    return Samples(4, drawn, seed=0)[0, index][0][1:]


def test_the_first_stands_in_for_the_last():
    assert Samples(4, broken_at(3), seed=0)[0, 3][0][0] == 0


def test_a_batch_without_any_readable_picture_is_not_whole():
    (batch, other) = batches(broken_at(0, 1, 2, 3), 4)
    assert not batch.whole and not other.whole
    assert {name for name, _ in batch.broken} == {"0.png", "1.png", "2.png", "3.png"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_whatever_loads_them(num_workers):
    found = batches(drawn, 6, num_workers=num_workers, epochs=2)
    assert len(found) == 6 and all(isinstance(batch, Batch) and batch.whole for batch in found)
    assert [batch.content for batch in found] == [batch.content for batch in batches(drawn, 6, epochs=2)]
    assert sorted(index for batch in found[:3] for index, *_ in batch.content) == list(range(6))


def test_repetitions_of_a_picture_are_distorted_differently():
    found = [sample for batch in batches(drawn, 6, repeats=3) for sample in batch.content]
    assert len(found) == 6
    indices = [index for index, *_ in found]
    assert indices == [indices[0]] * 3 + [indices[3]] * 3 and indices[0] != indices[3]
    assert len({value for _, value, *_ in found}) == 6
