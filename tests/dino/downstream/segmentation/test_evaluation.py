import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

import xcit
from dino.downstream.segmentation.classes import VOID
from dino.downstream.segmentation.data import open_data
from dino.downstream.segmentation.evaluation import Evaluation
from dino.downstream.segmentation.inference import Predictor
from dino.downstream.segmentation.views import TestView
from dino.runtime.interruption import Interruption
from dino.runtime.options import Interrupted
from tests.dino.downstream.segmentation.small_sets import write_picture, write_set
from xcit.segmenter import SemanticFPN


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = SemanticFPN(xcit.create_pyramid("xcit_pico_3_p8"), 2, channels=8).eval()
    torch.nn.init.normal_(network.decode_head.conv_seg.weight)
    return network


@pytest.fixture
def val(tmp_path):
    return open_data(str(write_set(tmp_path)), ignore=(1,)).val


def test_the_score_is_scikit_learns_over_the_judged_pixels_of_all_pictures(network, val):
    predict = Predictor(network, TestView(None))
    true, predicted = [], []
    for index in range(len(val)):
        image, places = val.read(index)
        true.append(places[places != VOID])
        predicted.append(predict(image)[places != VOID])
    evaluation = Evaluation(predict, val)
    measures = evaluation(network)
    expected = jaccard_score(np.concatenate(true), np.concatenate(predicted), average="macro")
    assert measures["miou"] == pytest.approx(100 * expected)
    assert evaluation.scores.counts_KK.sum() == sum(map(len, true))


def test_the_network_that_is_given_is_scored_and_not_the_predictors_own(network, val):
    other = SemanticFPN(xcit.create_pyramid("xcit_pico_3_p8"), 2, channels=8).eval()
    first = Evaluation(Predictor(network, TestView(None)), val)
    second = Evaluation(Predictor(other, TestView(None)), val)
    assert first(network) == second(network) != second(other)


def test_a_picture_that_cannot_be_read_is_left_out_and_named(network, val):
    val.pictures[1].picture.write_bytes(b"no picture")
    write_picture(val.pictures[2].picture, size=(8, 8))
    evaluation = Evaluation(Predictor(network, TestView(None)), val)
    evaluation(network)
    assert [line.split(":")[0].split("/")[-1] for line in evaluation.broken] == ["1.png", "2.png"]
    evaluation(network)
    assert len(evaluation.broken) == 2


def test_a_signal_ends_it(network, val):
    interruption = Interruption()
    interruption.signal_name = "SIGTERM"
    with pytest.raises(Interrupted, match="SIGTERM"):
        Evaluation(Predictor(network, TestView(None)), val, interruption)(network)
