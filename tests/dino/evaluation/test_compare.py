import json
from functools import partial

import pytest
import torch

from dino.evaluation import compare
from dino.runtime.backbones import create_backbone
from tests.dino.small_runs import write_pictures


@pytest.fixture
def run(call):
    return partial(call, compare.main)


def test_a_run_is_compared_with_its_own_random_start_at_its_own_size(finished, run, tmp_path):
    write_pictures(tmp_path / "data" / "train", count=6)
    write_pictures(tmp_path / "data" / "val", count=3, seed=1)
    flags = ("--data_path", tmp_path / "data", "--device", "cpu", "--num_workers", 0, "--epochs", 3, "--k", 5)
    output = run("--pretrained_weights", finished / "checkpoint.pth", *flags)
    table = output[output.index("top-1 accuracy, %") :].splitlines()
    assert table[0].split() == ["top-1", "accuracy,", "%", "random", "start", "trained", "p", "(McNemar)"]
    measures = [
        f"{measure}, {features}"
        for measure in ("5-NN", "linear, SGD", "logistic regression")
        for features in ("CLS", "CLS + patch mean")
    ]
    result = json.loads((tmp_path / "results.json").read_text())["compare"]
    assert [row["measure"] for row in result["results"]] == measures
    for row, line in zip(result["results"], table[1:7], strict=True):
        assert line.startswith(row["measure"])
        assert line.split()[-3:-1] == [f"{row['random']:.1f}", f"{row['trained']:.1f}"]
    assert result["preprocessing"]["size"] == 16 and "xcit_pico_3_p8: random weights" in output


def test_without_a_checkpoint_there_is_nothing_to_compare(run):
    assert "--pretrained_weights: name the checkpoint that is compared" in run("--data_path", "demo", code=2)


def test_random_vits_have_the_patch_size_of_the_checkpoint(run, tmp_path, monkeypatch):
    write_pictures(tmp_path / "data" / "train", count=3)
    write_pictures(tmp_path / "data" / "val", count=1, seed=1)
    vit = create_backbone("vit_tiny", 8)
    content = {"teacher": vit.state_dict(), "args": {"arch": "vit_tiny", "patch_size": 8, "eval_size": 16}}
    torch.save(content, tmp_path / "checkpoint.pth")
    flags = ("--data_path", tmp_path / "data", "--device", "cpu", "--num_workers", 0, "--epochs", 1, "--k", 1)
    made = []

    def create(arch, patch_size):
        made.append((arch, patch_size))
        return create_backbone(arch, patch_size)

    monkeypatch.setattr("dino.runtime.named_backbone.create_backbone", create)
    run("--pretrained_weights", tmp_path / "checkpoint.pth", *flags)
    assert made == [("vit_tiny", 8), ("vit_tiny", 8)]


def test_what_cannot_be_measured_is_refused_before_the_work(run):
    assert "k must be 1 or more, got 0" in run("--k", 0, code=2)
    assert "--epochs must be 1 or more, got 0" in run("--epochs", 0, code=2)


def test_the_random_start_is_that_of_the_run(finished, tmp_path, monkeypatch):
    """The first random weights of the run's seed, before its first step."""
    from dino.evaluation.evaluation_options import FeatureOptions
    from dino.evaluation.subject import create_subject
    from dino.plan import create_distillation
    from tests.dino.small_runs import tiny

    options = FeatureOptions(arch="xcit_pico_3_p8", pretrained_weights="random", image_size=16, seed=4)
    backbone = create_subject(options, torch.device("cpu")).extractor.backbone
    start = create_distillation(tiny("", tmp_path, seed=4), torch.device("cpu"), "fp32").teacher.backbone
    for ours, theirs in zip(backbone.parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, theirs)
