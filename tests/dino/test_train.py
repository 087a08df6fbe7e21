"""The command as a user meets it: its options, and a sentence for every mistake."""

import dataclasses
import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dino import train
from dino.runtime.options import parse_options
from dino.train_options import TrainOptions, preset_defaults
from tests.dino.small_runs import TINY

# The original's main_dino.py, all but --arch, which is xcit_small_12_p16 here.
DINO_FLAGS = {
    "patch_size": 16,
    "out_dim": 65536,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "use_bn_in_head": False,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "use_fp16": True,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "batch_size_per_gpu": 64,
    "epochs": 100,
    "freeze_last_layer": 1,
    "lr": 0.0005,
    "warmup_epochs": 10,
    "min_lr": 1e-06,
    "optimizer": "adamw",
    "drop_path_rate": 0.1,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_number": 8,
    "local_crops_scale": (0.05, 0.4),
    "data_path": "/path/to/imagenet/train/",
    "output_dir": ".",
    "saveckp_freq": 20,
    "seed": 0,
    "num_workers": 10,
    "dist_url": "env://",
    "local_rank": 0,
}

ONE_EPOCH = {
    **TINY,
    "epochs": 1,
    "warmup_epochs": 0,
    "knn_freq": 0,
    "saveckp_freq": 0,
}


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def run(monkeypatch, *arguments):
    tiny = [f"--{name}={value}" for name, value in ONE_EPOCH.items()]
    monkeypatch.setattr(sys, "argv", ["dino-train", *tiny, *map(str, arguments)])
    train.main()


def mistake(monkeypatch, capsys, *arguments):
    """The sentence that the command ends with, and nothing but it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    name, sentence = capsys.readouterr().err.split(": ", 1)
    assert name == "python -m dino.train"
    assert sentence.count("\n") == 1
    return sentence.strip()


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train_options(*arguments):
    return parse_options(
        TrainOptions, arguments, prog="prog", description="", default=preset_defaults(arguments)
    )


def test_all_31_flags_of_the_original_have_their_names_and_defaults():
    fields = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    assert len(DINO_FLAGS) + 1 == 31
    assert list(fields)[:31] == ["arch", *DINO_FLAGS]
    assert fields["arch"] == "xcit_small_12_p16"
    for name, value in DINO_FLAGS.items():
        assert fields[name] == value and type(fields[name]) is type(value), name
    assert TrainOptions() == train_options()


def test_a_command_line_of_the_original_is_understood():
    line = (
        "--arch vit_small --data_path /imagenet/train --output_dir out --norm_last_layer false "
        "--global_crops_scale 0.25 1. --use_fp16 True --optimizer lars --lr 5e-4 --epochs=300"
    )
    options = train_options(*line.split())
    assert (options.arch, options.norm_last_layer, options.use_fp16) == ("vit_small", False, True)
    assert (options.global_crops_scale, options.optimizer, options.epochs) == ((0.25, 1.0), "lars", 300)


_HELP = """
import sys
def no_network(event, arguments):
    assert not event.startswith("socket."), event
sys.addaudithook(no_network)
from dino.train import main
sys.argv = ["dino-train", "--help"]
try:
    main()
except SystemExit as stop:
    heavy = {"torch", "torchvision", "timm", "numpy", "matplotlib", "sklearn"} & set(sys.modules)
    print("LOADED", heavy or None, stop.code)
"""


def test_help_comes_at_once_without_network_and_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, not of the clock: other tests may run at the same time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "LOADED None 0"
    for field in dataclasses.fields(TrainOptions):
        assert f"--{field.name} " in done.stdout, field.name


def test_help_into_a_pipe_that_closes_early_is_silent():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dino.train", "--help"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert done.stderr == b"" and done.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "xcit_smal_12_p16"], "unknown model 'xcit_smal_12_p16'; did you mean xcit_small_12_p16"),
        (["--archh", "vit_tiny"], "Unrecognized options: --archh"),
        (["--epochs", "two"], "--epochs"),
        (["--optimizer", "adam"], "--optimizer"),
        (["--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["--warmup_epochs", "5"], "--warmup_epochs must lie between 0 and --epochs (1), got 5"),
        (["--batch_size_per_gpu", "9"], "an epoch has no step: 8 pictures do not fill one batch of 9; lower"),
        (
            ["--batch_size_per_gpu", "1", "--local_crops_size", "8"],
            "cannot be trained on 1 pictures at once",
        ),
        (["--arch", "vit_tiny", "--local_crops_size", "20"], "--local_crops_size 20: must be a multiple of"),
        (["--device", "gpu"], "unknown device 'gpu'; known: auto, cpu, cuda"),
        (["--init_from", "nowhere.pth"], "there is no file nowhere.pth"),
        (["--knn_freq", "1", "--knn_data", "/nowhere"], "/nowhere is no file or folder"),
        (["--data_path", "/nowhere"], "/nowhere is no file or folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(arguments, said, pictures, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    sentence = mistake(monkeypatch, capsys, "--data_path", pictures, "--output_dir", output, *arguments)
    assert said in sentence
    assert not content(output)


def test_an_empty_folder_is_one_sentence(tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    sentence = mistake(monkeypatch, capsys, "--data_path", empty, "--output_dir", tmp_path / "run")
    assert sentence.startswith(f"no pictures in {empty}: 0 files seen; .jpg")


@pytest.mark.parametrize("kind", ["below a file", "a file", "no such device"])
def test_a_folder_that_cannot_be_written_is_one_sentence(kind, pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    places = {
        "below a file": tmp_path / "file" / "run",
        "a file": tmp_path / "file",
        "no such device": "/proc/x",
    }
    sentence = mistake(monkeypatch, capsys, "--data_path", pictures, "--output_dir", places[kind])
    assert sentence.startswith(f"cannot write into --output_dir {places[kind]}: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_of_another_network_is_refused_and_kept(pictures, tmp_path, monkeypatch, capsys):
    places = ("--data_path", pictures, "--output_dir", tmp_path / "run")
    run(monkeypatch, *places)
    before = content(tmp_path)
    sentence = mistake(monkeypatch, capsys, *places, "--arch", "xcit_nano_12_p16")
    assert "holds a run with --arch xcit_pico_3_p8, this one has --arch xcit_nano_12_p16" in sentence
    sentence = mistake(monkeypatch, capsys, *places, "--optimizer", "sgd")
    assert "holds a run with --optimizer adamw, this one has --optimizer sgd" in sentence
    sentence = mistake(monkeypatch, capsys, *places, "--out_dim", "32")
    assert "give the --arch, --out_dim and head options that it was trained with" in sentence
    assert content(tmp_path) == before


def test_a_truncated_checkpoint_is_refused_and_kept(pictures, tmp_path, monkeypatch, capsys):
    places = ("--data_path", pictures, "--output_dir", tmp_path / "run")
    run(monkeypatch, *places)
    latest = tmp_path / "run" / "checkpoint.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    before = content(tmp_path)
    sentence = mistake(monkeypatch, capsys, *places)
    assert "is damaged or cut short; move it away to start anew" in sentence
    assert content(tmp_path) == before


def test_behind_a_truncated_checkpoint_the_one_before_is_resumed(pictures, tmp_path, monkeypatch, capsys):
    places = ("--data_path", pictures, "--output_dir", tmp_path / "run", "--epochs", "2")
    run(monkeypatch, *places)
    latest = tmp_path / "run" / "checkpoint.pth"
    whole, log = latest.read_bytes(), (tmp_path / "run" / "log.txt").read_text()
    latest.write_bytes(whole[:-1000])
    run(monkeypatch, *places)
    out = capsys.readouterr().out
    assert "cut short; resuming from checkpoint.previous.pth" in out
    assert "after 1 epochs" in out
    assert (tmp_path / "run" / "log.txt").read_text() == log


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_survives(
    pictures, tmp_path, monkeypatch, capsys
):
    places = ("--data_path", pictures, "--output_dir", tmp_path / "run")
    run(monkeypatch, *places)
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    before = checkpoint.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        sentence = mistake(monkeypatch, capsys, *places, "--epochs", "2")
    assert "No space left on device" in sentence
    assert "what was there before is unchanged" in sentence
    assert checkpoint.read_bytes() == before
    run(monkeypatch, *places, "--epochs", "2")
    assert "after 1 epochs" in capsys.readouterr().out
