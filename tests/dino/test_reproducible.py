"""What `--seed` promises: the same run again, bit for bit on a CPU."""

import pytest
import torch

from dino.pretraining import pretrain
from tests.dino.small_runs import assert_same_run, load, tiny

pytestmark = pytest.mark.usefixtures("quick")


def test_the_same_seed_is_the_same_run(tmp_path, pictures, finished):
    torch.manual_seed(12345)  # what the process did before does not matter
    torch.rand(3)
    pretrain(tiny(pictures, tmp_path))
    assert_same_run(tmp_path, finished)


def test_another_seed_is_another_run(tmp_path, pictures, finished):
    pretrain(tiny(pictures, tmp_path, seed=1, knn_freq=0))
    found, expected = load(tmp_path)["student"], load(finished)["student"]
    name = "module.backbone.blocks.0.mlp.fc1.weight"
    assert (found[name] - expected[name]).abs().mean() > 0.01


def test_deterministic_algorithms_train_the_same_run(tmp_path, pictures, finished):
    pretrain(tiny(pictures, tmp_path, deterministic=True))
    assert_same_run(tmp_path, finished)
    assert not torch.are_deterministic_algorithms_enabled()
