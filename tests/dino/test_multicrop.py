import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image
from torchvision.transforms import RandomResizedCrop

from benchmarks.multicrop import torchvision_transform
from dino.multicrop import _BOX_DRAWS, Box, MultiCrop, crop_resized, draw_box

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
DRAWS = 400
STILL = {"jitter": (0.0, 0.0, 0.0, 0.0), "grayscale": 0.0, "blur": 0.0}
PHOTO = Image.fromarray(load_sample_image("china.jpg"))


def multi_crop(*, size=16, scale=(1.0, 1.0), local_scale=(1.0, 1.0), local_number=1, **distortions):
    return MultiCrop(
        global_size=size,
        local_size=size,
        global_scale=scale,
        local_scale=local_scale,
        local_number=local_number,
        **distortions,
    )


def pixels(view):
    """Back to [0, 255]."""
    return (view * STD + MEAN) * 255


def picture(*colour, side=16):
    return Image.new("RGB", (side, side), colour)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def halves():
    """Left black, right white."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = 255
    return Image.fromarray(image)


def shares(image, holds, **options):
    """For each view, how often `holds` is true of its pixels."""
    torch.manual_seed(0)
    crop = multi_crop(**options)
    counts = np.zeros(len(crop.views))
    for _ in range(DRAWS):
        counts += [bool(holds(pixels(view))) for view in crop(image)]
    return counts / DRAWS


def is_blurred(view):
    return len(view[0].round().unique()) > 2


# Three standard deviations of a share of 400 draws; that of a wrong probability is further off.
def close(expected):
    return pytest.approx(expected, abs=0.06)


def test_views_have_their_sizes_global_ones_first():
    crop = MultiCrop(
        global_size=20, local_size=12, global_scale=(0.4, 1), local_scale=(0.05, 0.4), local_number=3
    )
    sizes = [(3, 20, 20)] * 2 + [(3, 12, 12)] * 3
    for made, dtype in (
        (crop(picture(10, 20, 30, side=50)), torch.float32),
        (crop.distorted(picture(10, 20, 30, side=50)).views, torch.uint8),
        (crop.cropped(picture(10, 20, 30, side=50)).views, torch.uint8),
    ):
        assert [tuple(view.shape) for view in made] == sizes
        assert all(view.dtype == dtype for view in made)
    assert len(multi_crop(local_number=0)(picture(1, 2, 3))) == 2


@pytest.mark.parametrize("content", ["photo", "noise"])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        (Box(10, 20, 330, 400), 224),
        (Box(0, 0, 375, 500), 224),
        (Box(0, 79, 319, 242), 224),
        (Box(50, 61, 149, 180), 96),
        (Box(100, 7, 61, 83), 96),
        (Box(374, 499, 1, 1), 17),
        (Box(5, 9, 1, 40), 16),
        (Box(5, 9, 37, 1), 16),
        (Box(0, 3, 2, 3), 50),
        (Box(30, 30, 96, 96), 96),
        (Box(30, 30, 200, 150), 1),
    ],
)
def test_a_crop_is_pillows_within_one_level(box, size, content):
    whole = noise(375, 500) if content == "noise" else np.asarray(PHOTO)[:375, :500]
    top, left, height, width = box
    part = Image.fromarray(whole).crop((left, top, left + width, top + height))
    # Rows first, then columns, as Pillow up to 12 does in one call; 13 begins with what is less work, so that in tall
    # parts other pixels are clipped on the way.
    rows = part.resize((size, height), Image.Resampling.BICUBIC)
    expected = np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    found = crop_resized(whole, box, size)
    assert found.dtype == np.uint8 and found.shape == (size, size, 3)
    difference = np.abs(found - expected)
    assert (difference > 1).mean() < (0.001 if content == "noise" else 1e-9)
    assert difference.max() <= 2 and difference.mean() < 0.05
    in_one_call = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - in_one_call).mean() < 0.5


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 170)])
def test_boxes_are_drawn_from_torchvisions_distribution(height, width, scale):
    def measures(box):
        top, left, rows, columns = box
        return rows * columns, columns / rows, top / max(height - rows, 1), left / max(width - columns, 1)

    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = [measures(RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))) for _ in range(2000)]
    uniform = torch.rand(2000, _BOX_DRAWS).tolist()
    ours = [measures(draw_box(numbers, height, width, scale)) for numbers in uniform]
    for one, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert ks_2samp(one, other).pvalue > 0.01


@pytest.mark.parametrize("size", [(10, 300), (300, 10), (1, 7), (7, 1), (3, 5), (5, 4), (1, 1), (2, 3)])
def test_the_box_in_the_middle_is_torchvisions_where_no_other_fits(size):
    expected = RandomResizedCrop.get_params(torch.empty(1, *size), (2.0, 2.0), (3 / 4, 4 / 3))
    assert draw_box(torch.rand(_BOX_DRAWS).tolist(), *size, (2.0, 2.0)) == expected


def test_boxes_touch_every_border_and_never_pass_it():
    torch.manual_seed(0)
    boxes = [draw_box(numbers, 6, 7, (0.1, 1.0)) for numbers in torch.rand(3000, _BOX_DRAWS).tolist()]
    assert {box.top for box in boxes} == set(range(5)) and {box.left for box in boxes} == set(range(6))
    assert max(box.top + box.height for box in boxes) == 6
    assert max(box.left + box.width for box in boxes) == 7


def test_views_are_distributed_as_those_of_torchvision_on_pillow():
    crop = MultiCrop(
        global_size=24, local_size=12, global_scale=(0.4, 1), local_scale=(0.05, 0.4), local_number=1
    )
    image = PHOTO.resize((64, 48))
    torch.manual_seed(0)
    ours = [crop(image) for _ in range(DRAWS)]
    for number, view in enumerate(crop.views):
        transform = torchvision_transform(view)
        theirs = [transform(image) for _ in range(DRAWS)]
        for measure in (torch.mean, torch.std, lambda v: v[0].mean() - v[2].mean(), torch.amax, torch.amin):
            found, expected = (  # rounded, as equal levels are normalised to neighbouring numbers
                [round(float(measure(v)), 3) for v in views] for views in ([o[number] for o in ours], theirs)
            )
            assert ks_2samp(found, expected).pvalue > 0.01


def test_each_view_is_blurred_as_often_as_the_paper_says():
    assert shares(halves(), is_blurred) == close([1.0, 0.1, 0.5])
    assert shares(halves(), is_blurred, blur=0.5) == close([0.5, 0.05, 0.25])
    assert shares(halves(), is_blurred, blur=0.0) == pytest.approx([0, 0, 0])


def test_only_the_second_global_view_is_solarized():
    assert shares(picture(255, 255, 255), lambda view: view.mean() < 128) == close([0, 0.2, 0])


def test_solarizing_inverts_from_128_up():
    inverted = shares(picture(128, 128, 128), lambda view: view.mean() < 127.5, **STILL)
    assert inverted == close([0, 0.2, 0])
    assert shares(picture(127, 127, 127), lambda view: view.mean() > 127.5, **STILL)[1] == 0


def test_half_of_the_views_are_flipped():
    assert shares(halves(), lambda view: view[0, :, 0].mean() > 128, **STILL)[[0, 2]] == close([0.5, 0.5])


def test_colours_are_lost_in_a_fifth_of_the_views():
    def is_grey(view):
        return (view - view[:1]).abs().max() < 1

    assert shares(picture(200, 30, 90), is_grey) == close([0.2, 0.2, 0.2])


def test_colours_are_jittered_in_four_fifths_of_the_views():
    # Equal channels are changed by brightness alone; an unlucky hundredth is changed by less than one level.
    def is_changed(view):
        return (view - 100).abs().max() > 0.5

    assert shares(picture(100, 100, 100), is_changed)[[0, 2]] == close([0.8, 0.8])


def test_brightness_stays_within_the_jitter():
    torch.manual_seed(0)
    levels = [pixels(multi_crop()(picture(100, 100, 100))[0]).mean().item() for _ in range(200)]
    assert 59 <= min(levels) < 64 and 136 < max(levels) <= 141


@pytest.mark.parametrize(("view", "least", "most"), [(0, 0.4, 1.0), (1, 0.4, 1.0), (2, 0.05, 0.4)])
def test_a_crop_takes_its_share_of_the_picture(view, least, most):
    torch.manual_seed(view)
    side = 128
    ramp = np.zeros((side, side, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(side)[None], np.arange(side)[:, None]
    crop = multi_crop(size=32, scale=(0.4, 1.0), local_scale=(0.05, 0.4), **STILL)
    taken = []
    for _ in range(150):
        shown = pixels(crop(Image.fromarray(ramp))[view])
        sides = [float(channel.max() - channel.min()) * 32 / 31 / side for channel in shown[:2]]
        taken.append(sides[0] * sides[1])
    assert least * 0.9 <= min(taken) < least + 0.1 and most - 0.15 < max(taken) <= most * 1.05


def test_views_are_normalised_with_imagenets_mean_and_deviation():
    for colour in ((0, 0, 0), (127, 64, 8)):
        expected = (torch.tensor(colour)[:, None, None] / 255 - MEAN) / STD
        view = multi_crop(**STILL)(picture(*colour))[0]
        torch.testing.assert_close(view, expected.expand(3, 16, 16), rtol=1e-5, atol=1e-5)


def test_the_seed_alone_decides():
    crop = multi_crop(scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_number=2)
    image = Image.fromarray(noise(40, 30))
    views = {}
    for run, seed in enumerate((1, 1, 2)):
        torch.manual_seed(seed)
        np.random.seed(run)
        random.seed(run)
        views[run] = torch.stack(crop(image))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert len({view.sum().item() for view in views[0]}) == 4  # and every view is drawn anew


def test_the_picture_and_other_generators_are_left_alone():
    image = Image.fromarray(noise(40, 30))
    before, states = np.array(image), (random.getstate(), np.random.get_state()[1].copy())
    multi_crop(scale=(0.4, 1.0), local_number=3)(image)
    assert (np.asarray(image) == before).all()
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5)])
def test_pictures_of_any_shape_work(size):
    torch.manual_seed(0)
    crop = multi_crop(scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    for _ in range(5):
        assert all(
            view.shape == (3, 16, 16) and view.isfinite().all() for view in crop(Image.new("RGB", size))
        )
