import pickle

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from dino.runtime.demo_pictures import DemoPictures


def pixels(pictures: DemoPictures, side: int = 16) -> np.ndarray:
    small = [pictures.picture(index).resize((side, side)) for index in range(len(pictures))]
    return np.stack([np.asarray(picture, np.float32).ravel() for picture in small])


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    pictures = DemoPictures(count=400)
    return np.stack([pictures.mask(index) for index in range(len(pictures))])


def test_sizes_and_classes_are_as_documented() -> None:
    assert (len(DemoPictures()), len(DemoPictures("val"))) == (2000, 500)
    pictures = DemoPictures(count=25, side=64)
    assert pictures.picture(3).size == (64, 64)
    assert pictures.mask(3).shape == (64, 64)
    assert len(set(pictures.classes)) == 10
    for part in (0, 1):
        assert len({name.split("-")[part] for name in pictures.classes}) == 10
    assert pictures.labels == [index % 10 for index in range(25)]
    assert pictures.name(13) == f"demo/train/{pictures.classes[3]}/00013"


def test_a_picture_depends_on_seed_split_and_index_alone() -> None:
    pictures = DemoPictures("val", count=30)
    backwards = [np.asarray(pictures.picture(index)) for index in reversed(range(30))][::-1]
    longer = pickle.loads(pickle.dumps(DemoPictures("val", count=60)))
    assert all(np.array_equal(longer.picture(index), backwards[index]) for index in range(30))
    for other in (DemoPictures("train", count=30), DemoPictures("val", count=30, seed=1)):
        assert not any(np.array_equal(other.picture(index), backwards[index]) for index in range(30))


def test_the_mask_is_where_the_texture_is() -> None:
    pictures = DemoPictures(count=50)
    for index in range(50):
        grey = np.asarray(pictures.picture(index).convert("L"), np.float32)
        detail = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
        mask = pictures.mask(index)[1:, 1:]
        assert detail[mask].mean() > 4 * detail[~mask].mean()


def test_objects_lie_inside_and_are_of_middling_size(masks: np.ndarray) -> None:
    side = masks.shape[1]
    assert not masks[:, [0, -1]].any()
    assert not masks[:, :, [0, -1]].any()
    extent = np.maximum(masks.any(1).sum(1), masks.any(2).sum(1)) / side
    assert 0.43 < extent.min() < 0.5 < 0.7 < extent.max() < 0.77
    assert 0.15 < masks.mean() < 0.25


def test_objects_lie_all_over_the_picture(masks: np.ndarray) -> None:
    rows, cols = (np.argmax(masks.any(axis), 1) + masks.any(axis).sum(1) / 2 for axis in (2, 1))
    centres = np.stack([rows, cols], axis=1) / masks.shape[1]
    assert np.all(centres.std(0) > 0.12)
    assert np.all(np.abs(centres.mean(0) - 0.5) < 0.03)
    assert np.mean(np.abs(centres - 0.5).max(1) > 0.1) > 0.8


def test_raw_pixels_do_not_tell_the_class() -> None:
    train, val = DemoPictures(count=600), DemoPictures("val", count=200)
    neighbours = KNeighborsClassifier(20, weights="distance").fit(pixels(train), train.labels)
    assert neighbours.score(pixels(val), val.labels) < 0.35


def test_mean_colours_do_not_tell_the_class() -> None:
    train, val = DemoPictures(count=600), DemoPictures("val", count=200)
    colours = [
        np.stack([np.asarray(p.picture(i))[p.mask(i)].mean(0) for i in range(len(p))]) for p in (train, val)
    ]
    neighbours = KNeighborsClassifier(20).fit(colours[0], train.labels)
    assert neighbours.score(colours[1], val.labels) < 0.35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be 'train' or 'val', got 'test'"),
        ({"count": 0}, "count must be at least 1, side at least 16, seed at least 0; got 0, 96, 0"),
        ({"side": 8}, "count must be at least 1, side at least 16, seed at least 0; got 2000, 8, 0"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoPictures(**arguments)


def test_an_index_outside_is_an_index_error() -> None:
    with pytest.raises(IndexError, match=r"index must be in 0\.\.9, got 10"):
        DemoPictures(count=10).picture(10)
