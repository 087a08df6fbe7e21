"""What a view gives of a picture, against the maps and features that it is made of."""

import numpy as np
import pytest
import torch

from dino.attention.heads import mirror_pair, pick_heads
from dino.attention.maps import attention_maps
from dino.attention.patch_features import patch_features, similarity
from dino.attention.view import View
from dino.runtime.backbones import open_backbone
from dino.runtime.options import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def named():
    return open_backbone("xcit_pico_3_p8", 8, "random")


def picture(seed: int = 0, rows: int = 40, cols: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), dtype=np.uint8)


def view(named, **options) -> View:
    return View(named, CPU, "fp32", **options)


def test_layers_are_the_chosen_heads_of_the_chosen_block(named):
    image = picture()
    looked = view(named, heads="mean,3,1", block=0)
    (maps_HRC,) = attention_maps(named.network, image[None], block=0)
    layers = looked.weights(looked.maps(image[None])[0])
    assert list(layers) == looked.names() == ["mean", "head3", "head1"]
    np.testing.assert_array_equal(layers["head3"], maps_HRC[3])
    np.testing.assert_allclose(layers["mean"], maps_HRC[[3, 1]].mean(axis=0), rtol=1e-6)


def test_heads_that_do_not_exist_are_refused_before_any_picture(named):
    with pytest.raises(UserError, match="--heads 9: this model has heads 0 to 3"):
        view(named, heads="9")
    with pytest.raises(UserError, match="--block 5: this model has 2 blocks"):
        view(named, block=5)
    with pytest.raises(UserError, match="ResNet has no class attention to draw"):
        view(open_backbone("resnet18", 8, "random"))


def test_auto_takes_the_heads_that_are_picked_from_the_samples(named):
    images = [picture(seed) for seed in range(3)]
    looked = view(named, heads="auto")
    assert looked.unsettled
    (sentence,) = looked.settle(images)
    assert not looked.unsettled
    both = [
        [attention_maps(named.network, pair[which][None])[0] for pair in (mirror_pair(i, 8) for i in images)]
        for which in (0, 1)
    ]
    picked, expected = pick_heads(*both)
    assert sentence == expected
    assert looked.names() == [f"head{number}" for number in picked]


def test_the_mean_of_several_heads_is_taken_on_request(named):
    for heads, expected in (
        ("0,2", ["mean", "head0", "head2"]),
        ("3", ["head3"]),
        ("max", ["max"]),
        ("max,0,1", ["max", "head0", "head1"]),
    ):
        looked = view(named, heads=heads)
        looked.take_mean_of_several()
        assert looked.names() == expected


def test_similarity_is_to_the_patch_under_the_point(named):
    image = picture()
    looked = view(named, heads="mean", similar_to=(17, 30))
    features = patch_features(named.network, image)
    expected = similarity(features, features[30 // 8, 17 // 8]).clip(0, 1)
    found = looked.features(image)["similarity"]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found[3, 2] == pytest.approx(1)


def test_in_a_clip_the_point_of_the_first_frame_is_followed(named):
    frames = np.stack([picture(1), picture(2)])
    looked = view(named, heads="mean", similar_to=(17, 30))
    first, second = looked.frame_layers(frames)
    features = [patch_features(named.network, frame) for frame in frames]
    np.testing.assert_allclose(
        second["similarity"], similarity(features[1], features[0][3, 2]).clip(0, 1), atol=1e-6
    )
    looked.restart()
    again, _ = looked.frame_layers(frames[::-1])
    assert again["similarity"][3, 2] == first["similarity"][3, 2] == pytest.approx(1)


def test_a_point_outside_of_the_picture_is_refused(named):
    with pytest.raises(UserError, match=r"row 41, column 3 lies outside .* 40 x 48"):
        view(named, similar_to=(3, 41)).features(picture())


def test_one_fit_colours_all_pictures(named):
    images = [picture(seed) for seed in range(2)]
    looked = view(named, heads="mean", pca=True)
    looked.settle(images)
    of_first = looked.features(images[0])["pca"]
    looked.features(images[1])
    np.testing.assert_array_equal(looked.features(images[0])["pca"], of_first)
    assert of_first.shape == (5, 6, 3) and 0 <= of_first.min() < of_first.max() <= 255
    assert looked.names() == ["mean", "pca"]
