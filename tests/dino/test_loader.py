from collections import Counter

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from dino.loader import BrokenPictures, EpochOrder, ViewsOfPictures, create_loader, mixed_seed
from dino.runtime.images import BrokenImageError
from dino.runtime.options import UserError
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
    return [pixels, pixels + torch.rand(3, 2, 2)]


def epoch_order(count=10, *, batch_size=2, steps=12, first_step=0, rank=0, world_size=1, seed=0):
    return EpochOrder(
        count,
        batch_size=batch_size,
        steps=steps,
        first_step=first_step,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )


def batches(order, *, broken=(), num_workers=0):
    pictures = Colours(order.count, broken)
    return list(create_loader(pictures, noisy, order, num_workers=num_workers, pin_memory=False))


def levels(batch):
    return [int(level) for level in batch.views[0][:, 0, 0, 0]]


def test_an_epoch_shows_every_picture_once_and_the_next_in_another_order():
    shown = [levels(batch) for batch in batches(epoch_order())]
    assert len(shown) == 12
    epochs = [[level for batch in shown[start : start + 5] for level in batch] for start in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(10))


def test_pictures_that_fill_no_batch_are_left_out_of_the_epoch_but_not_always_the_same():
    left_out = []
    keys = list(epoch_order(11, batch_size=3, steps=30))
    for epoch in range(10):
        shown = [index for batch in keys[3 * epoch : 3 * epoch + 3] for _, index in batch]
        assert len(set(shown)) == 9
        left_out += set(range(11)) - set(shown)
    assert len(set(left_out)) > 2


def test_the_global_batches_are_the_same_for_any_number_of_processes():
    alone = [set(batch) for batch in epoch_order(22, batch_size=4, steps=11)]
    for world_size in (2, 4):
        parts = [
            list(epoch_order(22, batch_size=4 // world_size, steps=11, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        together = [[key for part in step for key in part] for step in zip(*parts, strict=True)]
        assert [set(batch) for batch in together] == alone
        assert all(len(batch) == 4 for batch in together)


@pytest.mark.parametrize("first_step", range(13))
def test_resuming_at_any_step_gives_exactly_the_tail(first_step):
    order = epoch_order(first_step=first_step)
    assert list(order) == list(epoch_order())[first_step:]
    assert len(order) == 12 - first_step


def test_a_run_that_is_already_over_has_no_batches():
    assert list(epoch_order(first_step=20)) == [] and len(epoch_order(first_step=20)) == 0


def test_views_depend_on_seed_epoch_and_picture_alone():
    first, again = batches(epoch_order()), batches(epoch_order())
    tail = batches(epoch_order(first_step=7))
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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_training_processs_random_numbers_are_left_alone(num_workers):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches(epoch_order(steps=2), num_workers=num_workers)
    assert torch.equal(torch.rand(3), expected)


def test_a_broken_picture_is_named_and_the_next_readable_one_stands_in():
    dataset = ViewsOfPictures(Colours(5, broken={3, 4}), noisy, seed=0)
    views, broken = dataset[0, 3]
    assert broken == [("3.png", "empty file"), ("4.png", "empty file")]
    assert views[0].unique() == 0
    own_place, _ = dataset[0, 0]
    assert not torch.equal(views[1], own_place[1])  # the same picture, but not the same view twice


def test_a_batch_keeps_its_size_when_pictures_are_broken():
    loaded = batches(epoch_order(), broken={0, 5})
    assert all(len(batch.views[0]) == 2 for batch in loaded)
    assert {name for batch in loaded for name, _ in batch.broken} == {"0.png", "5.png"}


def test_a_set_of_only_broken_pictures_gives_no_views():
    loaded = batches(epoch_order(4, steps=1), broken=range(4))
    assert loaded[0].views == [] and len(loaded[0].broken) == 8


def test_search_for_a_stand_in_ends_after_the_attempts():
    dataset = ViewsOfPictures(Colours(9, broken=range(8)), noisy, seed=0, attempts=3)
    assert dataset[0, 0].views == [] and len(dataset[0, 0].broken) == 3


def test_pictures_are_asked_for_no_more_pixels_than_are_enough():
    pictures = Colours(2)
    list(create_loader(pictures, noisy, epoch_order(2, steps=1), enough=77, num_workers=0, pin_memory=False))
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
