import multiprocessing
import os
import signal
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from dino.loader import (
    Batch,
    BrokenPictures,
    EpochOrder,
    ViewsOfPictures,
    _stack,
    create_loader,
    joined,
    mixed_seed,
    steady_batches,
)
from dino.multicrop import Views
from dino.runtime.images import BrokenImageError
from dino.runtime.options import RankFailed, UserError
from dino.runtime.pictures import Pictures


class Colours(Pictures):
    """Picture i has the level i; some are broken."""

    def __init__(self, count, broken=()):
        self.classes, self.labels = [], None
        self.count = count
        self.broken = set(broken)
        self.asked = []

    def __len__(self):
        return self.count

    def name(self, index):
        return f"{index}.png"

    def picture(self, index, *, at_least=None):
        self.asked.append(at_least)
        if index in self.broken:
            raise BrokenImageError(self.name(index), "empty file")
        return Image.new("RGB", (2, 2), (index, index, index))


def noisy(picture):
    """Two views: the picture itself, and it with noise."""
    pixels = to_tensor(picture) * 255
    return Views([pixels, pixels + torch.rand(3, 2, 2)])


def drawn(picture):
    """A view with its channels together in memory, and what is to be done to it."""
    return Views([torch.rand(2, 2, 3).permute(2, 0, 1)], torch.rand(1, 8))


def epoch_order(count=10, *, batch=2, epochs=3, **place):
    return EpochOrder(count, global_batch=batch, epochs=epochs, seed=place.pop("seed", 0), **place)


def batches(order, *, broken=(), num_workers=0):
    pictures = Colours(order.count, broken)
    return list(create_loader(pictures, noisy, order, num_workers=num_workers, pin_memory=False))


def levels(batch):
    return [int(level) for level in batch.views[0][:, 0, 0, 0]]


def test_repeated_pictures_follow_each_other_in_an_epoch_that_is_no_longer():
    order = epoch_order(12, batch=4, epochs=2, repeats=3)
    lists = list(order)
    assert len(lists) == len(order) == 6
    keys = [key for batch in lists for key in batch]
    assert len(set(keys)) == 24 and {turn for turn, _ in keys[:12]} == {0, 1, 2}
    assert [index for _, index in keys[:12]] == [index for _, index in keys[:12:3] for _ in range(3)]
    shares = [list(epoch_order(12, batch=4, epochs=2, repeats=3, rank=rank, world_size=2)) for rank in (0, 1)]
    together = [
        [key for pair in zip(*step, strict=True) for key in pair] for step in zip(*shares, strict=True)
    ]
    assert together == lists
    assert list(order.after(4)) == lists[4:]


def test_an_epoch_shows_every_picture_once_and_the_next_in_another_order():
    shown = [levels(batch) for batch in batches(epoch_order())]
    assert len(shown) == 15
    epochs = [[level for batch in shown[start : start + 5] for level in batch] for start in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(10))


def test_pictures_that_fill_no_batch_are_left_out_of_the_epoch_but_not_always_the_same():
    left_out = []
    keys = list(epoch_order(11, batch=3, epochs=10))
    for epoch in range(10):
        shown = [index for batch in keys[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(shown)) == 9
        left_out += set(range(11)) - set(shown)
    assert len(set(left_out)) > 2


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batches_are_the_same_for_any_number_of_processes_and_parts(world_size, parts):
    alone = [set(batch) for batch in epoch_order(42, batch=8)]
    shares = [
        list(epoch_order(42, batch=8, rank=rank, world_size=world_size, parts=parts))
        for rank in range(world_size)
    ]
    assert {len(batch) for share in shares for batch in share} == {8 // world_size // parts}
    steps = [[key for batch in zip(*shares, strict=True) for part in batch for key in part]]
    together = [steps[0][start : start + 8] for start in range(0, len(steps[0]), 8)]
    assert [set(step) for step in together] == alone
    assert len(steps[0]) == 3 * 40


@pytest.mark.parametrize("steps", range(16))
def test_after_any_step_comes_exactly_the_tail(steps):
    whole = list(epoch_order())
    for order in (epoch_order(epoch=steps // 5, samples=2 * (steps % 5)), epoch_order().after(steps)):
        assert list(order) == whole[steps:]
        assert len(order) == 15 - steps
    middle = epoch_order(epoch=1, samples=3)  # 3 more steps, whose places are between those of before
    assert list(middle.after(steps)) == list(middle)[steps:]


@pytest.mark.parametrize("new_batch", [1, 3, 5, 7])
@pytest.mark.parametrize("samples", [0, 4, 6, 8])
def test_another_batch_goes_on_with_the_next_picture_without_repeats_or_holes(samples, new_batch):
    seen = [index for batch in epoch_order(22, epochs=1) for _, index in batch][:samples]
    rest = [
        index for batch in epoch_order(22, epochs=1, batch=new_batch, samples=samples) for _, index in batch
    ]
    order = [index for batch in epoch_order(22, epochs=1, batch=1) for _, index in batch]
    assert seen + rest == order[: samples + new_batch * ((22 - samples) // new_batch)]


def test_a_run_that_is_already_over_has_no_batches():
    for order in (epoch_order(epoch=3), epoch_order(epoch=2, samples=10), epoch_order(epoch=2, samples=9)):
        assert list(order) == [] and len(order) == 0
    smaller_now = epoch_order(count=6, epoch=1, samples=8)
    assert len(list(smaller_now)) == len(smaller_now) == 3


def test_views_depend_on_seed_epoch_and_picture_alone():
    first, again = batches(epoch_order()), batches(epoch_order())
    tail = batches(epoch_order(epoch=1, samples=4))
    other = batches(epoch_order(seed=1))
    for ours, theirs in [*zip(first, again, strict=True), *zip(first[7:], tail, strict=True)]:
        assert all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views, strict=True))
    assert [levels(batch) for batch in first] != [levels(batch) for batch in other]
    noise = Counter(
        round((noisy_view - clean).sum().item(), 4)
        for batch in first
        for clean, noisy_view in zip(*batch.views, strict=True)
    )
    assert max(noise.values()) == 1  # also the same picture in two epochs is distorted anew


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_workers_change_nothing():
    alone, helped = batches(epoch_order(), broken={3}), batches(epoch_order(), broken={3}, num_workers=2)
    for ours, theirs in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views, strict=True))
        assert ours.broken == theirs.broken


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_is_to_be_done_to_the_views_comes_with_them(num_workers):
    order = epoch_order(4, epochs=1)
    loader = create_loader(Colours(4), drawn, order, num_workers=num_workers, pin_memory=False)
    dataset = ViewsOfPictures(Colours(4), drawn, seed=0)
    for batch, keys in zip(loader, order, strict=True):
        samples = [dataset[key] for key in keys]
        assert torch.equal(batch.views[0], torch.stack([sample.views[0] for sample in samples]))
        assert batch.views[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.distortions, torch.stack([sample.distortions for sample in samples]))
    assert batches(order)[0].distortions is None
    assert _stack([*samples, Batch([], [("a", "x")])]) == Batch([], [("a", "x")])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_parts_of_a_step_come_together_with_what_is_to_be_done_to_them():
    def open_loader(order):
        return create_loader(Colours(8), drawn, order, num_workers=0, pin_memory=False)

    parts = list(open_loader(epoch_order(8, batch=4, epochs=1, parts=2)))
    steps = list(
        steady_batches(open_loader, epoch_order(8, batch=4, epochs=1, parts=2), join=joined, say=print)
    )
    assert len(steps) == 2 and len(parts) == 4
    for step, two in zip(steps, (parts[:2], parts[2:]), strict=True):
        assert torch.equal(step.views[0], torch.cat([part.views[0] for part in two]))
        assert torch.equal(step.distortions, torch.cat([part.distortions for part in two]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_computes_with_one_thread():
    def threads(picture):
        cv2.blur(
            np.zeros((500, 500), np.uint8), (9, 9)
        )  # would wait for ever for threads that were not forked with it
        return Views([torch.tensor([cv2.getNumThreads(), torch.get_num_threads()])])

    cv2.blur(np.zeros((2000, 2000), np.uint8), (9, 9))  # starts those of this process
    loader = create_loader(Colours(2), threads, epoch_order(2, epochs=1), num_workers=1, pin_memory=False)
    assert next(iter(loader)).views[0].tolist() == [[1, 1]] * 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_training_processs_random_numbers_are_left_alone(num_workers):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches(epoch_order(4, epochs=1), num_workers=num_workers)
    assert torch.equal(torch.rand(3), expected)


def test_a_broken_picture_is_named_and_the_next_readable_one_stands_in():
    dataset = ViewsOfPictures(Colours(5, broken={3, 4}), noisy, seed=0)
    views, broken, _ = dataset[0, 3]
    assert broken == [("3.png", "empty file"), ("4.png", "empty file")]
    assert views[0].unique() == 0
    assert not torch.equal(views[1], dataset[0, 0].views[1])  # the same picture, but not the same view twice


def test_a_batch_keeps_its_size_when_pictures_are_broken():
    loaded = batches(epoch_order(), broken={0, 5})
    assert all(len(batch.views[0]) == 2 for batch in loaded)
    assert {name for batch in loaded for name, _ in batch.broken} == {"0.png", "5.png"}


def test_a_set_of_only_broken_pictures_gives_no_views():
    loaded = batches(epoch_order(4, epochs=1), broken=range(4))
    assert loaded[0].views == [] and len(loaded[0].broken) == 8


def test_search_for_a_stand_in_ends_after_the_attempts():
    dataset = ViewsOfPictures(Colours(9, broken=range(8)), noisy, seed=0, attempts=3)
    assert dataset[0, 0].views == [] and len(dataset[0, 0].broken) == 3


def test_pictures_are_asked_for_no_more_pixels_than_are_enough():
    pictures = Colours(2)
    list(create_loader(pictures, noisy, epoch_order(2, epochs=1), enough=77, num_workers=0, pin_memory=False))
    assert pictures.asked == [77, 77]


def test_seeds_of_neighbouring_numbers_differ_in_all_their_bits():
    seeds = {mixed_seed(0, epoch, picture) for epoch in range(20) for picture in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 1000 for seed in seeds}) > 250


def test_broken_pictures_are_told_once_each_and_stop_the_run_beyond_the_limit():
    broken = BrokenPictures(limit=1)
    assert broken.add([("a.jpg", "empty file"), ("a.jpg", "empty file")]) == [
        "broken picture skipped: a.jpg: empty file"
    ]
    assert broken.add([("a.jpg", "empty file")]) == []
    broken.check()
    broken.add([("b.jpg", "truncated")])
    with pytest.raises(UserError) as stop:
        broken.check()
    assert str(stop.value) == (
        "2 broken pictures, --max_broken allows 1; mend or remove them, or raise --max_broken:\n"
        "  a.jpg: empty file\n  b.jpg: truncated"
    )


@pytest.mark.parametrize(("limit", "stops"), [(0, True), (2, False), (-1, False)])
def test_limit_zero_allows_none_and_a_negative_one_any_number(limit, stops):
    broken = BrokenPictures(limit)
    broken.add([("a", "x"), ("b", "x")])
    if stops:
        with pytest.raises(UserError, match="--max_broken allows 0"):
            broken.check()
    else:
        broken.check()


@pytest.fixture
def impatient(monkeypatch):
    """A loader looks after its workers every so many seconds while it waits; five are long for a test."""
    waiting = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.3,))


class Fragile(Colours):
    """A worker that is shown the picture dies of it, so many times."""

    def __init__(self, count, deadly, lives):
        super().__init__(count)
        self.deadly = deadly
        self.deaths = multiprocessing.Value("i", 0)
        self.lives = lives

    def picture(self, index, *, at_least=None):
        if index == self.deadly and self.deaths.value < self.lives:
            self.deaths.value += 1
            os.kill(os.getpid(), signal.SIGKILL)
        return super().picture(index)


def steady(pictures, order, said, **settings):
    def open_loader(order):
        return create_loader(pictures, noisy, order, num_workers=2, pin_memory=False)

    return steady_batches(open_loader, order, join=joined, say=said.append)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_that_dies_costs_no_batch(parts, impatient):
    order = epoch_order(12, batch=4, epochs=2, parts=parts)
    said = []
    found = list(steady(Fragile(12, deadly=7, lives=1), order, said))
    expected = [levels(batch) for batch in batches(epoch_order(12, batch=4, epochs=2))]
    assert [levels(batch) for batch in found] == expected
    assert said == [
        "a loading process was killed (by the system, when no memory is left); its work is begun again, and no "
        "picture is left out"
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_die_again_and_again_end_the_run(impatient):
    order, said = epoch_order(8, epochs=1), []
    with pytest.raises(RankFailed, match=r"loading processes died 4 times in a row: lower --num_workers"):
        list(steady(Fragile(8, deadly=next(iter(order))[1][1], lives=99), order, said))
    assert len(said) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_mistake_in_a_worker_is_no_death():
    class Wrong(Colours):
        def picture(self, index, *, at_least=None):
            raise RuntimeError("a mistake of ours")

    said = []
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(steady(Wrong(4), epoch_order(4, epochs=1), said))
    assert said == []


def test_a_death_is_not_raised_in_the_middle_of_a_step():
    order = epoch_order(8, epochs=1)
    feed = steady(Colours(8), order, [])
    next(feed)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    feed.close()


def test_a_batch_with_a_hole_has_no_views_so_that_all_processes_have_as_many_pictures():
    pictures = Colours(6, broken={1, 2})
    order = epoch_order(6, batch=6, epochs=1)
    dataset = ViewsOfPictures(pictures, noisy, seed=0, attempts=1)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=order, collate_fn=_stack)
    (batch,) = loader
    assert batch.views == [] and {name for name, _ in batch.broken} == {"1.png", "2.png"}
