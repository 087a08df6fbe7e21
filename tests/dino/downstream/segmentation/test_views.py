import colorsys

import numpy as np
import pytest
import torch

from dino.downstream.segmentation import views as segmentation_views
from dino.downstream.segmentation.classes import VOID
from dino.downstream.segmentation.views import TestView, TrainingViews, distorted, normalised
from dino.runtime.images import IMAGENET_MEAN, IMAGENET_STD

PLAIN = {"flip": False, "photometric": False, "ratios": (1.0, 1.0), "scale": None}


def noise(rows=48, cols=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), np.uint8)


def to_bytes(pixels):
    """What `normalised` was given."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (255 * (pixels * std + mean)).round().to(torch.uint8).permute(1, 2, 0).numpy()


def places_of(image):
    """A mask that tells for each pixel which one it is of: its red value."""
    return image[..., 0].astype(np.int16)


def test_a_crop_of_the_whole_is_the_picture_and_its_mask():
    image = noise(64, 64)
    pixels, places = TrainingViews(64, **PLAIN)(image, places_of(image))
    assert (pixels.dtype, places.dtype) == (torch.float32, torch.int64)
    assert np.array_equal(to_bytes(pixels), image)
    assert np.array_equal(places, places_of(image))


def test_pixels_are_normalised_with_imagenets_mean_and_deviation():
    image = noise()
    expected = (image / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert np.allclose(normalised(image).permute(1, 2, 0), expected, atol=1e-5)


@pytest.fixture
def every_warning():
    """torch says most things once in a process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_pictures_and_masks_that_must_not_be_written_to_are_taken_without_a_warning(every_warning):
    image = noise(64, 64)
    places = places_of(image)
    image.flags.writeable = places.flags.writeable = False
    for view in (TrainingViews(64, **PLAIN), TrainingViews(32, (64, 64))):
        view(image, places)
    assert torch.equal(TestView(None)(image), normalised(image))


@pytest.mark.parametrize("seed", range(8))
def test_crop_and_mirror_take_picture_and_mask_along(seed):
    torch.manual_seed(seed)
    image = noise()
    views = TrainingViews(32, **{**PLAIN, "flip": True}, most_of_one=1.0)
    pixels, places = views(image, places_of(image))
    assert np.array_equal(to_bytes(pixels)[..., 0], places)


def test_half_of_the_crops_are_mirrored():
    image = np.tile(np.arange(32, dtype=np.uint8)[None, :, None], (32, 1, 3))
    views = TrainingViews(32, **{**PLAIN, "flip": True})
    torch.manual_seed(0)
    mirrored = sum(int(views(image, places_of(image))[1][0, 0] == 31) for _ in range(200))
    assert 70 < mirrored < 130


def test_small_pictures_are_padded_with_zero_and_void_at_the_bottom_and_on_the_right():
    image = noise(20, 30)
    pixels, places = TrainingViews(32, **PLAIN)(image, places_of(image))
    assert (places[20:] == VOID).all() and (places[:, 30:] == VOID).all()
    assert (pixels[:, 20:] == 0).all() and (pixels[..., 30:] == 0).all()
    assert np.array_equal(places[:20, :30], places_of(image))


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((360, 480), (2048, 512), (512, 683)),
        ((480, 360), (2048, 512), (683, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((360, 480), (512, 2048), (512, 683)),
        ((360, 480), (240, 180), (180, 240)),
        ((31, 47), None, (31, 47)),
        ((1, 4000), (240, 180), (1, 240)),
    ],
)
def test_pictures_are_fitted_into_the_scale_with_their_proportions(size, scale, expected):
    assert TestView(scale)(np.zeros((*size, 3), np.uint8)).shape == (3, *expected)


def test_random_factors_lie_between_the_ratios_and_reach_both_ends():
    image = np.zeros((40, 40, 3), np.uint8)
    views = TrainingViews(100, (40, 40), ratios=(0.5, 2.0), flip=False, photometric=False)
    torch.manual_seed(0)
    sides = [int((views(image, np.zeros((40, 40), np.int16))[1][0] != VOID).sum()) for _ in range(200)]
    assert min(sides) >= 20 and max(sides) <= 80
    assert min(sides) < 25 and max(sides) > 75


def test_resized_masks_hold_only_numbers_that_were_there_and_lie_over_the_picture():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20:] = 200
    places = np.where(image[..., 0] > 100, 7, 3).astype(np.int16)
    torch.manual_seed(0)
    pixels, found = TrainingViews(64, (64, 64), ratios=(1, 1), flip=False, photometric=False)(image, places)
    assert set(found.unique().tolist()) == {3, 7}
    assert np.array_equal(to_bytes(pixels)[..., 0] > 100, found == 7)


def one_corner_differs():
    """A class in the upper left quarter, another everywhere else."""
    places = np.zeros((64, 64), np.int16)
    places[:32, :32] = 1
    return places


def test_crops_that_one_class_fills_are_drawn_again():
    views = TrainingViews(16, **PLAIN, most_of_one=0.75)
    anything = TrainingViews(16, **PLAIN, most_of_one=1.0)
    image, places = noise(64, 64), one_corner_differs()

    def filled(views):
        torch.manual_seed(0)
        crops = [views(image, places)[1] for _ in range(100)]
        return sum(int(max((crop == 0).sum(), (crop == 1).sum()) >= 0.75 * crop.numel()) for crop in crops)

    assert filled(views) < filled(anything) / 2


def test_after_ten_tries_the_last_crop_is_taken(monkeypatch):
    tries = []
    real = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kw: tries.append(args) or real(*args, **kw))
    TrainingViews(16, **PLAIN)(noise(64, 64), np.zeros((64, 64), np.int16))
    assert len(tries) == 2 * 10
    assert segmentation_views._CROPS_TRIED == 10


def test_void_does_not_count_for_a_class_and_a_void_mask_is_cropped_too():
    places = np.full((64, 64), VOID, np.int16)
    pixels, found = TrainingViews(16, **PLAIN)(noise(64, 64), places)
    assert pixels.shape == (3, 16, 16)
    assert (found == VOID).all()


def test_the_same_seed_draws_the_same_view_and_another_one_another():
    image, views = noise(), TrainingViews(32, (64, 48))

    def view(seed):
        torch.manual_seed(seed)
        return views(image, places_of(image))[0]

    assert torch.equal(view(3), view(3))
    assert not torch.equal(view(3), view(4))


def test_other_generators_are_not_drawn_from():
    before = np.random.get_state()[1].copy()
    TrainingViews(32, (64, 48))(noise(), places_of(noise()))
    assert np.array_equal(np.random.get_state()[1], before)


def test_inputs_stay_as_they_are():
    image = noise()
    places = places_of(image)
    copies = image.copy(), places.copy()
    for seed in range(6):
        torch.manual_seed(seed)
        TrainingViews(32, (64, 48))(image, places)
    assert np.array_equal(image, copies[0]) and np.array_equal(places, copies[1])


def draw(monkeypatch, *numbers):
    """`distorted` with given draws; what is left of them decides nothing."""
    given = iter(numbers)
    monkeypatch.setattr(segmentation_views, "_uniform", lambda low, high: next(given))


def test_brightness_is_added(monkeypatch):
    image = np.full((2, 2, 3), 100, np.uint8)
    draw(monkeypatch, 1.0, 0.0, 32.0, 1.0, 1.0, 1.0)
    assert (distorted(image) == 132).all()


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_contrast_is_multiplied_before_or_after_the_colours(monkeypatch, first):
    image = np.full((2, 2, 3), 200, np.uint8)
    numbers = [first, 1.0, 0.0, 1.5, 1.0, 1.0] if first == 0.0 else [first, 1.0, 1.0, 1.0, 0.0, 1.5]
    draw(monkeypatch, *numbers)
    assert (distorted(image) == 255).all()


def test_saturation_is_multiplied(monkeypatch):
    image = np.zeros((2, 2, 3), np.uint8)
    image[:] = (200, 100, 100)
    draw(monkeypatch, 1.0, 1.0, 0.0, 1.0, 0.5, 1.0)
    hue, saturation, value = colorsys.rgb_to_hsv(*(distorted(image)[0, 0] / 255))
    assert hue == pytest.approx(0, abs=0.01)
    assert saturation == pytest.approx(0.25, abs=0.01)
    assert value == pytest.approx(200 / 255, abs=0.01)


def test_hue_turns_around_the_circle(monkeypatch):
    image = np.zeros((2, 2, 3), np.uint8)
    image[:] = (200, 100, 100)
    draw(monkeypatch, 1.0, 1.0, 1.0, 0.0, 1.0)
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(-18))
    hue, _, _ = colorsys.rgb_to_hsv(*(distorted(image)[0, 0] / 255))
    assert hue == pytest.approx(1 - 36 / 360, abs=0.01)


def test_half_of_the_pictures_keep_each_property():
    image = noise(4, 4)
    torch.manual_seed(0)
    unchanged = sum(int(np.array_equal(distorted(image), image)) for _ in range(400))
    assert 10 < unchanged < 45  # one in sixteen
