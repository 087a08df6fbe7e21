"""What a view gives of a picture, against the maps and features that it is made of."""

import gc
import weakref

import numpy as np
import pytest
import torch

from dino.attention.heads import mirror_pair, pick_heads
from dino.attention.maps import attention_maps
from dino.attention.patch_features import OutsideError, patch_features, similarity
from dino.attention.view import NoRoomError, View
from dino.runtime.named_backbone import open_backbone
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
    with pytest.raises(UserError, match="no class attention to draw in ResNet"):
        view(open_backbone("resnet18", 8, "random"))
    with pytest.raises(UserError, match="--tile is for XCiT"):
        view(open_backbone("vit_tiny", 16, "random"), tile=64)
    with pytest.raises(UserError, match="--tile 7: a tile holds at least one patch of 8"):
        view(named, tile=7)


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


def test_without_a_sample_nothing_is_settled_and_one_is_held_at_a_time(named):
    looked = view(named, heads="auto", pca=True)
    assert looked.settle([]) == [] and looked.unsettled
    alive: list[weakref.ref] = []

    def samples():
        for seed in range(3):
            image = picture(seed)
            alive.append(weakref.ref(image))
            yield image
            del image
            gc.collect()
            assert sum(one() is not None for one in alive) <= 1

    assert len(looked.settle(samples())) == 1 and not looked.unsettled
    assert looked.single_heads and looked.shows_single_heads


@pytest.mark.parametrize(
    ("heads", "numbers", "single"),
    [("all", (0, 1, 2, 3), True), ("mean", (), False), ("max,3", (3,), True), ("auto", (), True)],
)
def test_single_heads_are_those_that_were_asked_for(named, heads, numbers, single):
    looked = view(named, heads=heads)
    assert (looked.single_heads, looked.shows_single_heads) == (numbers, single)


def test_a_tile_holds_for_features_too(named):
    image = picture(rows=40, cols=400)
    whole, tiled = (
        view(named, heads="mean", similar_to=(0, 0), tile=tile).features(image)["similarity"]
        for tile in (0, 64)
    )
    assert whole.shape == tiled.shape and (whole != tiled).any()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        MemoryError(),
    ],
)
def test_a_picture_too_large_for_the_memory_is_told_what_helps(named, monkeypatch, error):
    def full(*_: object, **__: object) -> None:
        raise error

    looked = view(named, similar_to=(0, 0))
    for name in ("attention_maps", "patch_features"):
        monkeypatch.setattr(f"dino.attention.view.{name}", full)
    for look in (lambda: looked.maps(picture()[None]), lambda: looked.features(picture())):
        with pytest.raises(
            NoRoomError, match=r"^the memory of cpu .* 48 x 40 pixels: .*--image_size, or .*--tile"
        ):
            look()


def test_other_errors_of_the_network_are_not_taken_for_a_full_memory(named, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not match")

    looked = view(named)
    monkeypatch.setattr("dino.attention.view.attention_maps", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        looked.maps(picture()[None])


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
    with pytest.raises(OutsideError, match=r"the point 3 41 lies outside .* 48 x 40 pixels"):
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
