"""Distortions of batches against those of one view at a time; differences are in levels of 8 bits."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from dino import distortions
from dino.batched_distortions import OnDevice, distort
from dino.distortions import ORDERS, Distortion, normalised
from dino.loader import Batch, _stack, _together
from dino.multicrop import MultiCrop

CPU = torch.device("cpu")
PHOTO = load_sample_image("china.jpg")
CROP = MultiCrop(
    global_size=32, local_size=20, global_scale=(0.4, 1), local_scale=(0.05, 0.4), local_number=3
)
LEVEL = 1 / (255 * 0.225)  # of a normalised view


def views_of(count, side, *, noisy=False):
    if noisy:
        return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    corners = [(37 * i % 380, 41 * i % 600) for i in range(count)]
    return np.stack([PHOTO[top : top + side, left : left + side] for top, left in corners])


def both(drawn, side=24, **content):
    """The same views distorted in a batch, and one by one."""
    views = views_of(len(drawn), side, **content)
    batched = distort(torch.from_numpy(views).permute(0, 3, 1, 2), torch.tensor(drawn, dtype=torch.float32))
    alone = [distortions.distort(view, one) for view, one in zip(views, drawn, strict=True)]
    return batched.permute(0, 2, 3, 1).numpy().astype(int), np.stack(alone)


def batch_of(transform, count=5, seed=0):
    torch.manual_seed(seed)
    made = [transform(Image.fromarray(PHOTO[:, 30 * i : 30 * i + 250])) for i in range(count)]
    return _stack([Batch(views, [], drawn) for views, drawn in made])


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("name", "values", "most", "mean"),
    [
        ("brightness", (0.0, 0.6, 0.9, 1.1, 1.4), 1, 0.05),
        ("contrast", (0.0, 0.6, 0.9, 1.1, 1.4), 1, 0.05),
        ("saturation", (0.0, 0.8, 0.93, 1.1, 1.2), 1, 0.15),
        ("hue", (-0.5, -0.1, -0.01, 0.03, 0.1), 15, 1.5),
        ("grayscale", (True,), 1, 0.05),
        ("blur", (0.1, 0.3, 0.7, 1.0, 1.42, 2.0), 1, 0.05),
        ("solarize", (True,), 0, 0.0),
    ],
)
def test_each_distortion_is_that_of_the_workers(name, values, most, mean, noisy):
    found, expected = both([Distortion(**{name: value}) for value in values], noisy=noisy)
    assert np.abs(found - expected).max() <= most
    assert np.abs(found - expected).mean() <= mean


def test_every_view_of_a_batch_has_its_own_order():
    drawn = [
        Distortion(order, 1.35 - 0.02 * order, 0.7 + 0.01 * order, 1.2, 0.08) for order in range(len(ORDERS))
    ]
    found, expected = both(drawn)
    of_view = np.abs(found - expected).mean(axis=(1, 2, 3))
    assert of_view.max() < 1.5
    backwards = [one._replace(order=ORDERS.index(ORDERS[one.order][::-1])) for one in drawn]
    assert np.abs(both(backwards)[0] - expected).mean() > 4 * of_view.mean()


@pytest.mark.parametrize("side", [1, 2, 5, 13])
def test_views_narrower_than_the_blur_work(side):
    found, expected = both([Distortion(blur=2.0), Distortion(0, 1.2, 0.8, 1.1, 0.1, True, 1.0, True)], side)
    assert np.abs(found - expected)[0].max() <= 1
    assert np.median(np.abs(found - expected)[1]) <= 2


def test_what_is_not_to_be_distorted_stays_and_the_views_given_are_not_painted_on():
    views = torch.from_numpy(views_of(3, 16)).permute(0, 3, 1, 2)
    before = views.clone()
    drawn = torch.tensor([Distortion(), Distortion(solarize=True, blur=1.0), Distortion(order=5)])
    found = distort(views, drawn)
    assert torch.equal(views, before)
    assert torch.equal(found[[0, 2]], before[[0, 2]]) and not torch.equal(found[1], before[1])
    nothing = distort(views, drawn[[0, 2, 0]])
    assert torch.equal(nothing, before) and nothing.data_ptr() != views.data_ptr()


def test_a_view_is_distorted_alike_in_any_batch():
    torch.manual_seed(0)
    batch = batch_of(CROP.cropped)
    together = OnDevice(CPU)(batch)
    for picture in range(5):
        one = Batch(
            [view[picture : picture + 1] for view in batch.views], [], batch.distortions[picture, None]
        )
        for alone, among in zip(OnDevice(CPU)(one), together, strict=True):
            torch.testing.assert_close(alone[0], among[picture], rtol=0, atol=1.01 * LEVEL)


def test_views_are_the_same_wherever_they_are_distorted():
    by_workers, by_device = batch_of(CROP.distorted), batch_of(CROP.cropped)
    assert by_workers.distortions is None and by_device.distortions.shape == (5, 5, len(Distortion._fields))
    finish = OnDevice(CPU)
    found, expected = finish(by_device), finish(by_workers)
    assert [tuple(view.shape) for view in found] == [(5, 3, 32, 32)] * 2 + [(5, 3, 20, 20)] * 3
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32 and one.is_contiguous()
        assert (one - other).abs().mean() < LEVEL
        assert np.quantile((one - other).abs(), 0.99) < 6 * LEVEL


def test_finished_views_are_those_of_a_call():
    finished = OnDevice(CPU)(batch_of(CROP.distorted))
    torch.manual_seed(0)
    called = [CROP(Image.fromarray(PHOTO[:, 30 * i : 30 * i + 250])) for i in range(5)]
    for number, views in enumerate(finished):
        assert torch.equal(views, torch.stack([views_of_one[number] for views_of_one in called]))


def test_parts_put_together_give_the_views_of_each():
    parts = [batch_of(CROP.cropped, 3, seed) for seed in (0, 1)]
    whole = _together(parts, torch.cat)
    assert whole.distortions.shape[0] == 6
    finish = OnDevice(CPU)
    for view, *own in zip(finish(whole), *(finish(part) for part in parts), strict=True):
        torch.testing.assert_close(view, torch.cat(own), rtol=0, atol=1.01 * LEVEL)


def test_views_of_one_size_keep_their_order():
    crop = MultiCrop(
        global_size=16,
        local_size=16,
        global_scale=(0.4, 1),
        local_scale=(0.05, 0.4),
        local_number=2,
        jitter=(0,) * 4,
    )
    batch = batch_of(crop.cropped)
    still = batch._replace(distortions=torch.tensor(Distortion()).expand(5, 4, -1))
    for found, view in zip(OnDevice(CPU)(still), batch.views, strict=True):
        assert torch.equal(found, normalised(view))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_distorts_as_a_cpu_does_and_the_host_never_waits_for_it():
    batch = batch_of(CROP.cropped)
    finish = OnDevice(torch.device("cuda"))
    finish(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = finish(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for view, expected in zip(found, OnDevice(CPU)(batch), strict=True):
        assert (view.cpu() - expected).abs().mean() < 0.1 * LEVEL
