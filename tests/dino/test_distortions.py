"""Distortions of one view against torchvision's on Pillow; differences are in levels of 8 bits."""

from functools import partial

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from scipy.stats import chisquare, ks_1samp, ks_2samp, uniform
from sklearn.datasets import load_sample_image
from torchvision.transforms import ColorJitter

from dino.distortions import (
    BLUR_REACH,
    DRAWS,
    ORDERS,
    PAPER_JITTER,
    Distortion,
    blur_kernels,
    distort,
    draw_distortion,
    normalised,
)

PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((97, 90))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 50, 3), np.uint8))
IMAGES = {
    "photo": PHOTO,
    "noise": NOISE,
    "one pixel": Image.new("RGB", (1, 1), (200, 31, 90)),
    "grey": PHOTO.convert("L").convert("RGB"),
    "white": Image.new("RGB", (5, 3), (255, 255, 255)),
}
TORCHVISION = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
    "grayscale": lambda image, _: TF.to_grayscale(image, 3),
    "solarize": lambda image, _: TF.solarize(image, 128),
}


def difference(image, distortion, expected):
    found = distort(np.asarray(image), distortion)
    assert found.dtype == np.uint8 and found.shape == np.asarray(image).shape
    return np.abs(found.astype(int) - np.asarray(expected))


def draws(count, **probabilities):
    torch.manual_seed(0)
    settings = {"jitter": PAPER_JITTER, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2, **probabilities}
    return [draw_distortion(numbers, **settings) for numbers in torch.rand(count, DRAWS).tolist()]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(
    ("name", "value", "most", "mean"),
    [
        *(("brightness", value, 1, 0.05) for value in (0.0, 0.6, 0.83, 1.0, 1.17, 1.4, 2.0)),
        *(("contrast", value, 1, 0.05) for value in (0.0, 0.6, 0.83, 1.0, 1.17, 1.4, 2.0)),
        *(("saturation", value, 1, 0.2) for value in (0.8, 0.93, 1.0, 1.1, 1.2)),
        ("grayscale", True, 1, 0.05),
        ("solarize", True, 0, 0.0),
    ],
)
def test_a_distortion_is_pillows(image, name, value, most, mean):
    expected = TORCHVISION[name](IMAGES[image], value)
    levels = difference(IMAGES[image], Distortion(**{name: value}), expected)
    assert levels.max() <= most
    if image in ("photo", "noise"):  # in others all pixels may be rounded alike
        assert levels.mean() <= mean


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.05, 0.01, 0.03, 0.1, 0.5])
@pytest.mark.parametrize(("image", "most", "mean"), [("photo", 12, 1.2), ("noise", 20, 2.5), ("grey", 0, 0)])
def test_a_turn_of_the_hue_is_pillows_but_for_its_steps(image, most, mean, turn):
    levels = difference(IMAGES[image], Distortion(hue=turn), TF.adjust_hue(IMAGES[image], turn))
    assert levels.max() <= most and levels.mean() <= mean


def test_whole_turns_of_the_hue_bring_red_to_green_to_blue():
    red = np.full((2, 2, 3), (200, 20, 20), np.uint8)
    for turn, colour in ((1 / 3, (20, 200, 20)), (-1 / 3, (20, 20, 200))):
        assert np.abs(distort(red, Distortion(hue=turn)).astype(int) - colour).max() <= 8


@pytest.mark.parametrize("deviation", [0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 1.42, 1.7, 2.0])
@pytest.mark.parametrize(("image", "most"), [("photo", 3), ("noise", 4)])
def test_blur_is_pillows_within_its_roundings_but_at_the_border(image, most, deviation):
    expected = IMAGES[image].filter(ImageFilter.GaussianBlur(deviation))
    levels = difference(IMAGES[image], Distortion(blur=deviation), expected)
    within = slice(BLUR_REACH, -BLUR_REACH)
    assert levels[within, within].max() <= most
    assert levels.mean() <= 1.1


@pytest.mark.parametrize("deviation", [0.1, 0.4, 1.0, 1.414, 1.415, 2.0])
def test_the_blur_is_three_boxes_of_the_gaussians_variance(deviation):
    half = blur_kernels(np.array([deviation]))[0]
    kernel = np.concatenate([half[:0:-1], half])
    at = np.arange(-BLUR_REACH, BLUR_REACH + 1)
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert (kernel * at**2).sum() == pytest.approx(deviation**2, abs=1e-9)
    radius = (np.sqrt(4 * deviation**2 + 1) - 1) // 2
    part = (deviation**2 / 3 - radius * (radius + 1) / 3) / (
        2 * ((radius + 1) ** 2 - radius * (radius + 1) / 3)
    )
    inside = [(1 - 2 * part) / (2 * radius + 1)] * int(2 * radius + 1)
    box = [part, *inside, part]
    threefold = np.convolve(np.convolve(box, box), box)
    reach = len(threefold) // 2
    np.testing.assert_allclose(kernel[BLUR_REACH - reach : BLUR_REACH + reach + 1], threefold, atol=1e-12)


@pytest.mark.parametrize("order", range(len(ORDERS)))
def test_the_jitter_is_applied_in_its_order(order):
    factors = {"brightness": 1.35, "contrast": 0.7, "saturation": 1.2, "hue": 0.08}
    names = list(factors)
    expected = PHOTO
    for number in ORDERS[order]:
        expected = TORCHVISION[names[number]](expected, factors[names[number]])
    levels = difference(PHOTO, Distortion(order, **factors), expected)
    assert levels.mean() < 1.2
    backwards = difference(PHOTO, Distortion(ORDERS.index(ORDERS[order][::-1]), **factors), expected)
    assert levels.mean() < backwards.mean()


def test_grey_then_blur_then_solarization_follow():
    drawn = Distortion(grayscale=True, blur=1.0, solarize=True)
    expected = TF.to_grayscale(PHOTO, 3).filter(ImageFilter.GaussianBlur(1.0))
    expected = TF.solarize(expected, 128)
    levels = difference(PHOTO, drawn, expected)
    # What the blur rounds to the other side of the threshold differs by its whole height.
    assert np.median(levels) <= 1 and (levels > 4).mean() < 0.03


def test_nothing_drawn_changes_nothing_and_the_view_is_never_painted_on():
    for image in IMAGES.values():
        before = np.array(image)
        assert (distort(before, Distortion()) == before).all()
        drawn = Distortion(3, 1.2, 0.8, 1.1, 0.05, grayscale=True, blur=1.5, solarize=True)
        given = before.copy()
        distort(given, drawn)
        assert (given == before).all()


def test_factors_are_drawn_from_torchvisions_distributions():
    jitter = ColorJitter(*PAPER_JITTER)
    get_params = partial(jitter.get_params, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    torch.manual_seed(1)
    theirs = list(zip(*(get_params()[1:] for _ in range(2000)), strict=True))
    jittered = [drawn for drawn in draws(2500) if drawn[1:5] != Distortion()[1:5]]
    assert len(jittered) / 2500 == pytest.approx(0.8, abs=0.03)
    for place, factors in enumerate(theirs, start=1):
        assert ks_2samp([drawn[place] for drawn in jittered], factors).pvalue > 0.01


def test_factors_never_fall_below_zero():
    assert {drawn.brightness for drawn in draws(50, jitter=(0.0, 0.0, 0.0, 0.0))} == {1.0}
    strong = [drawn.contrast for drawn in draws(500, jitter=(0.4, 3.0, 0.2, 0.1))]
    assert min(strong) >= 0 and 3.8 < max(strong) <= 4


def test_all_orders_are_as_likely():
    orders = [drawn.order for drawn in draws(4800)]
    assert chisquare(np.bincount(orders, minlength=len(ORDERS))).pvalue > 0.01
    assert len(ORDERS) == len(set(ORDERS)) == 24


def test_blur_grey_and_solarization_come_as_often_as_asked():
    drawn = draws(4000, grayscale=0.2, blur=0.5, solarize=0.3)
    assert np.mean([one.grayscale for one in drawn]) == pytest.approx(0.2, abs=0.02)
    assert np.mean([one.solarize for one in drawn]) == pytest.approx(0.3, abs=0.025)
    deviations = [one.blur for one in drawn if one.blur]
    assert len(deviations) / 4000 == pytest.approx(0.5, abs=0.025)
    assert ks_1samp(deviations, uniform(0.1, 1.9).cdf).pvalue > 0.01
    independent = np.corrcoef(np.array([list(map(float, one)) for one in drawn])[:, 5:].T)
    assert np.abs(independent - np.eye(3)).max() < 0.06
    for probability, share in ((0.0, 0.0), (1.0, 1.0)):
        sure = draws(100, grayscale=probability, blur=probability, solarize=probability)
        assert {(one.grayscale, one.blur > 0, one.solarize) for one in sure} == {(share,) * 3}


def test_views_are_normalised_as_by_torchvision():
    expected = TF.normalize(TF.to_tensor(NOISE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    view = torch.from_numpy(np.array(NOISE)).permute(2, 0, 1)
    torch.testing.assert_close(normalised(view), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalised(view[None, None])[0, 0], expected, rtol=1e-5, atol=1e-5)
