import numpy as np
import pytest
import torch
import torch.nn.functional as F

import xcit
from dino.downstream.segmentation.inference import Predictor, largest, starts
from dino.downstream.segmentation.views import TestView
from xcit.segmenter import HEADS

CLASSES = 5
OWN_SIZE = TestView(None)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = HEADS["fpn"](xcit.create_pyramid("xcit_pico_3_p8"), CLASSES, channels=16).eval()
    torch.nn.init.normal_(network.decode_head.conv_seg.weight)
    return network


def picture(rows, cols, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), np.uint8)


def test_a_picture_gets_the_class_of_its_largest_logit(network):
    image = picture(50, 70)
    with torch.no_grad():
        expected = network(OWN_SIZE(image)[None]).logits[0].argmax(dim=0)
    found = Predictor(network, OWN_SIZE)(image)
    assert found.dtype == np.int16
    assert np.array_equal(found, expected)
    assert len(np.unique(found)) > 1


def test_a_resized_picture_gets_an_answer_of_its_own_size(network):
    image = picture(90, 120)
    view = TestView((60, 45))
    assert Predictor(network, view)(image).shape == (90, 120)


@pytest.mark.parametrize("size", [(64, 64), (50, 60), (1, 64)])
def test_windows_over_a_picture_that_fits_one_of_them_equal_the_whole(network, size):
    image = picture(*size)
    whole = Predictor(network, OWN_SIZE)(image)
    assert np.array_equal(Predictor(network, OWN_SIZE, window=64, stride=44)(image), whole)


@pytest.mark.parametrize("size", [(100, 64), (96, 150), (128, 128)])
def test_windows_are_averaged_where_they_overlap(network, size):
    image = picture(*size)
    rows, cols = (32 * -(-side // 32) for side in size)
    pixels = F.pad(OWN_SIZE(image), (0, cols - size[1], 0, rows - size[0]))
    total, counts = torch.zeros(CLASSES, rows // 4, cols // 4), torch.zeros(rows // 4, cols // 4)
    for top in sorted({*range(0, rows - 64, 40), rows - 64}):
        for left in sorted({*range(0, cols - 64, 40), cols - 64}):
            with torch.no_grad():
                seen = network.coarse(pixels[None, :, top : top + 64, left : left + 64])[0]
            total[:, top // 4 : top // 4 + 16, left // 4 : left // 4 + 16] += seen
            counts[top // 4 : top // 4 + 16, left // 4 : left // 4 + 16] += 1
    logits = F.interpolate((total / counts)[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    expected = logits.argmax(dim=0)[: size[0], : size[1]]
    found = Predictor(network, OWN_SIZE, window=64, stride=40)(image)
    assert (torch.from_numpy(found) == expected).float().mean() > 0.999  # ties by rounding


@pytest.mark.parametrize(
    ("side", "window", "stride", "expected"),
    [(64, 64, 40, [0]), (32, 64, 40, [0]), (96, 64, 40, [0, 32]), (160, 64, 32, [0, 32, 64, 96])],
)
def test_windows_begin_at_every_stride_and_the_last_ends_with_the_picture(side, window, stride, expected):
    assert list(starts(side, window, stride)) == expected


@pytest.mark.parametrize("size", [(64, 96), (128, 192), (45, 100), (7, 200)])
def test_logits_are_interpolated_as_torch_does(size):
    logits = torch.randn(CLASSES, 16, 24)
    expected = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    found = torch.from_numpy(largest(logits, shown=(64, 96), size=size))
    assert (found == expected).float().mean() > 0.999


def test_bands_do_not_show(monkeypatch):
    logits = torch.randn(CLASSES, 16, 24)
    whole = largest(logits, shown=(60, 90), size=(60, 90))
    monkeypatch.setattr("dino.downstream.segmentation.inference._VALUES_AT_ONCE", 1)
    assert np.array_equal(largest(logits, shown=(60, 90), size=(60, 90)), whole)


def test_a_picture_without_end_costs_a_window_and_the_logits_of_its_places(network, monkeypatch):
    """The network is never shown more than a window, so its memory does not grow with the picture."""
    shown = []
    real = network.coarse
    monkeypatch.setattr(network, "coarse", lambda images: shown.append(images.shape) or real(images))
    found = Predictor(network, OWN_SIZE, window=64, stride=64)(picture(200, 330))
    assert found.shape == (200, 330)
    assert set(shown) == {(1, 3, 64, 64)}
