import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from dino.downstream.classification.views import training_view
from dino.downstream.samples import drawing
from dino.runtime.images import IMAGENET_MEAN, IMAGENET_STD


def view(size, **changes):
    settings = {
        "scale": (0.9, 1.0),
        "color_jitter": 0.0,
        "auto_augment": "none",
        "interpolation": "bicubic",
        "erase": 0.0,
        "erase_mode": "const",
        "erase_count": 1,
    }
    return training_view(size, **{**settings, **changes})


def noise(side=40):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_picture_of_32_pixels_is_shifted_and_not_resized():
    assert tuple(view(32)(noise(32)).shape) == (3, 32, 32)
    with drawing(0):
        shifted = view(32, erase=0.0)(noise(32))
    whole = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(
        noise(32)
    )
    places = [
        torch.equal(
            side[:, max(0, -y) : 32 - max(0, y), max(0, -x) : 32 - max(0, x)],
            whole[:, max(0, y) : 32 + min(0, y), max(0, x) : 32 + min(0, x)],
        )
        for side in (shifted, shifted.flip(-1))
        for y in range(-4, 5)
        for x in range(-4, 5)
    ]
    assert sum(places) == 1


def test_views_have_the_size_and_imagenets_scale():
    white = Image.new("RGB", (70, 50), "white")
    found = view(48)(white)
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    assert tuple(found.shape) == (3, 48, 48)
    assert torch.allclose(found.mean(dim=(1, 2)), expected, atol=1e-2)


def test_a_part_is_erased():
    white = Image.new("RGB", (64, 64), "white")
    found = view(48, erase=1.0)(white)
    assert 0 < (found == 0).all(dim=0).float().mean() < 0.5


def test_all_draws_come_from_the_generators_that_are_seeded():
    recipe = view(48, scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", erase=0.5, erase_mode="pixel")
    found = []
    for seed in (1, 1, 2):
        with drawing(seed):
            found.append(recipe(noise()))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
