import numpy as np
import pytest
from timm.data import ImageNetInfo

from dino.evaluation.imagenet import imagenet_numbers, what_is_missing

SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def test_the_folders_of_all_classes_are_numbered_in_alphabetical_order():
    assert sorted(SYNSETS) == SYNSETS and len(SYNSETS) == 1000
    np.testing.assert_array_equal(imagenet_numbers(SYNSETS), np.arange(1000))


def test_some_of_the_folders_keep_their_numbers():
    # Known by everybody: tench is the first class, golden retriever 207, toilet tissue the last.
    assert imagenet_numbers(["n01440764", "n02099601", "n15075141"]).tolist() == [0, 207, 999]
    assert imagenet_numbers(["n15075141", "n01440764"]).tolist() == [999, 0]
    assert imagenet_numbers(["n02099601"]).dtype == np.int64


def test_a_thousand_other_names_count_by_their_order():
    assert imagenet_numbers([f"{number:04d}" for number in range(1000)]).tolist() == list(range(1000))


@pytest.mark.parametrize(
    "names", [["cats", "dogs"], ["n01440764", "cats"], ["n00000000"], [*SYNSETS[:-1], "a", "b"]]
)
def test_other_classes_have_no_number(names):
    assert imagenet_numbers(names) is None


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [
        ((1000, 50_000, 1_281_167), None),
        ((1000, 50_000), None),
        (
            (10, 3_925, 9_469),
            "10 of 1,000 classes, 3,925 of 50,000 val pictures, 9,469 of 1,281,167 training pictures",
        ),
        ((1000, 49_999), "49,999 of 50,000 val pictures"),
        ((1000, 50_000, 0), "0 of 1,281,167 training pictures"),
    ],
)
def test_what_a_set_lacks_of_imagenet_is_said(numbers, missing):
    assert what_is_missing(*numbers) == missing
