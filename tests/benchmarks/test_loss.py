"""The benchmark of the loss's memory and time; that both ways come to the same gradient."""

import json

import pytest
import torch

from benchmarks.loss import LossOptions, measure, our_way, textbook_way
from dino.runtime.options import UserError


def test_both_ways_have_the_same_gradient_also_after_the_center_has_moved():
    theirs, ours = (way((4, 3, 17), "cpu") for way in (textbook_way, our_way))
    gradients = []
    for _ in range(3):
        gradients.append(theirs())
        torch.testing.assert_close(ours(), gradients[-1], rtol=1e-5, atol=1e-7)
    assert not torch.equal(gradients[0], gradients[2])


@pytest.mark.slow
def test_it_reports_memory_and_time(tmp_path, capsys):
    file = tmp_path / "loss.json"
    measure(LossOptions(images=8, views=6, prototypes=65536, turns=1, output=str(file)))
    memory, time, *_ = json.loads(file.read_text())["comparisons"]
    gradient = 8 * 6 * 65536 * 4 / 1e6
    assert gradient < min(memory["ours"]) < 2.5 * gradient < min(memory["theirs"])
    assert (memory["unit"], memory["target"], time["unit"]) == ("MB", 4, "ms")
    assert "loss and gradient, peak beyond inputs, 8 x 6 x 65536" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match=r"--views must be 2 or more, .* got 1, 64 and 65536"):
        measure(LossOptions(views=1))
