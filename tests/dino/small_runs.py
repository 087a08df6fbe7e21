"""Whole runs of a tiny network on a few pictures, and how to compare and interrupt them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dino.distillation import SelfDistillation
from dino.pretraining import pretrain
from dino.runtime import checkpoint
from dino.train_options import TrainOptions

CPU = torch.device("cpu")


class Killed(BaseException):
    """As sudden as a signal: nothing in the program catches it."""


TINY = {
    "arch": "xcit_pico_3_p8",
    "out_dim": 16,
    "head_hidden_dim": 32,
    "bottleneck_dim": 16,
    "global_crops_size": 16,
    "local_crops_size": 16,
    "local_crops_number": 1,
    "batch_size_per_gpu": 4,
    "precision": "fp32",
    "device": "cpu",
    "num_workers": 0,
}


def write_pictures(folder, classes=("cats", "dogs"), count=8, seed=0):
    noise = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = noise.integers(0, 128, (24, 28, 3), dtype=np.uint8)
            pixels[..., number] += 100
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def tiny(data_path, output_dir, **changes):
    """4 steps of 4 pictures per epoch, 2 epochs."""
    options = TrainOptions(
        **TINY,
        epochs=2,
        warmup_epochs=1,
        lr=0.1,
        freeze_last_layer=1,
        saveckp_freq=0,
        knn_freq=1,
        data_path=str(data_path),
        output_dir=str(output_dir),
    )
    return replace(options, **changes)


def load(folder, name="checkpoint.pth"):
    return checkpoint.load(folder / name)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def run_until_killed(options, number):
    """The step of this number, counted from 0, is cut off in its middle."""
    calls = iter(range(number))
    step = SelfDistillation.step

    def cut(self, views, rates):
        if next(calls, None) is None:
            self.student.backbone.norm.weight.data.fill_(7)  # half done
            raise Killed
        return step(self, views, rates)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SelfDistillation, "step", cut)
        pretrain(options)


def killed_if(condition):
    if condition:
        raise Killed


def assert_same(found, expected, path="checkpoint"):
    """Bit for bit, at any depth."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


def assert_same_run(folder, expected):
    found, wanted = load(folder), load(expected)
    del found["args"], wanted["args"]
    assert_same(found, wanted)
    assert rows(folder) == rows(expected)
