import cv2
import numpy as np
import pytest

from dino.downstream.class_colors import class_color, colors


def test_a_class_has_one_colour_however_many_there_are():
    assert np.array_equal(colors(5), colors(200)[:5])
    assert class_color(3) == tuple(colors(10)[3].tolist())


@pytest.mark.parametrize(("count", "apart"), [(11, 40), (20, 30), (150, 9)])
def test_colours_can_be_told_apart(count, apart):
    lab = cv2.cvtColor(colors(count)[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(count)
    assert distance.min() > apart


def test_more_classes_than_colours_begin_again():
    assert np.array_equal(colors(600)[256:512], colors(256))
