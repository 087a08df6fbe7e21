"""The benchmark of forward passes, on small pictures."""

import json

import pytest
import torch

from benchmarks.forward import _OURS, _TIMMS, ForwardOptions, create, look, measure
from dino.runtime.options import UserError

SMALL = {"arch": "xcit_nano_12_p16", "vit": "vit_tiny_patch16_224", "batch": 2, "turns": 1}


def test_both_networks_compute_the_same():
    import timm

    options = ForwardOptions(**SMALL)
    ours, timms = create(_OURS, options), create(_TIMMS, options)
    timms.load_state_dict(timm.models.xcit.checkpoint_filter_fn(ours.state_dict(), timms))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(look(ours, images), look(timms, images), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_it_reports_sides_growth_and_one_huge_picture_and_draws(tmp_path):
    file, plot = tmp_path / "forward.json", tmp_path / "plot.png"
    measure(
        ForwardOptions(
            **SMALL, sides=(32, 64), huge=(64, 96), plot_sides=(32, 64), output=str(file), plot=str(plot)
        )
    )
    paths = [row["path"] for row in json.loads(file.read_text())["comparisons"]]
    assert paths == [
        "forward, xcit_nano_12_p16, 2 x 32 x 32",
        "forward, xcit_nano_12_p16, 1 x 64 x 64",
        "forward, growth from 32 to 64",
        "forward, xcit_nano_12_p16, 96 x 64",
        "forward, xcit_nano_12_p16, 96 x 64, memory beyond weights",
    ]
    assert plot.stat().st_size > 10_000


def test_a_side_of_zero_is_refused():
    with pytest.raises(UserError, match="must be 1 or more"):
        measure(ForwardOptions(sides=(0,)))
