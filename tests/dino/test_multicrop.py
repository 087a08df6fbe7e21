import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dino.multicrop import GaussianBlur, MultiCrop

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
DRAWS = 400
STILL = {"jitter": (0.0, 0.0, 0.0, 0.0), "grayscale": 0.0, "blur": 0.0}


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
    views = crop(picture(10, 20, 30, side=50))
    assert [tuple(view.shape) for view in views] == [(3, 20, 20)] * 2 + [(3, 12, 12)] * 3
    assert all(view.dtype == torch.float32 for view in views)
    assert len(multi_crop(local_number=0)(picture(1, 2, 3))) == 2


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
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    views = {}
    for run, seed in enumerate((1, 1, 2)):
        torch.manual_seed(seed)
        np.random.seed(run)
        views[run] = torch.stack(crop(noise))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert len({view.sum().item() for view in views[0]}) == 4  # and every view is drawn anew


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5)])
def test_pictures_of_any_shape_work(size):
    torch.manual_seed(0)
    crop = multi_crop(scale=(0.4, 1.0), local_scale=(0.05, 0.4))
    for _ in range(5):
        assert all(
            view.shape == (3, 16, 16) and view.isfinite().all() for view in crop(Image.new("RGB", size))
        )


def test_blur_equals_pillows_and_draws_its_radius_from_the_range(monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    expected = np.asarray(noise.filter(ImageFilter.GaussianBlur(1.5)))
    assert (np.asarray(GaussianBlur(1.0, radius=(1.5, 1.5))(noise)) == expected).all()

    radii = []
    monkeypatch.setattr(
        "dino.multicrop.ImageFilter.GaussianBlur", lambda radius: radii.append(radius) or ImageFilter.BLUR
    )
    torch.manual_seed(0)
    for _ in range(DRAWS):
        GaussianBlur(1.0)(noise)
    assert 0.1 <= min(radii) < 0.15 and 1.95 < max(radii) <= 2.0
    assert np.mean(radii) == pytest.approx(1.05, abs=0.1)
