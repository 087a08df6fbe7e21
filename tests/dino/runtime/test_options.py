import dataclasses
import io
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from dino.runtime.options import RunStopped, UserError, command, option, parse_options
from dino.train import PRESETS, TrainOptions, preset_defaults, preset_text

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


@dataclass(frozen=True)
class Options:
    epochs: int = option(10, "Passes over the pictures.")
    fast: bool = option(False, "Whether to hurry.")
    crop_scale: tuple[float, float] = option((0.4, 1.0), "Share of the picture.")
    kind: str = option("red", "Colour.", choices=("red", "green"))


def parse(*arguments):
    return parse_options(Options, arguments, prog="prog", description="", default=Options())


def train_options(*arguments):
    return parse_options(
        TrainOptions, arguments, prog="prog", description="", default=preset_defaults(arguments)
    )


def exit_of(monkeypatch, run, *arguments):
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    with pytest.raises(SystemExit) as stop:
        command(Options, run, prog="prog", description="")
    return stop.value.code


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


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("False", False), ("0", False), ("1", True), ("off", False), ("on", True)],
)
def test_booleans_are_written_as_the_original_writes_them(word, value):
    assert parse("--fast", word).fast is value


def test_hyphens_and_underscores_are_the_same():
    assert parse("--crop-scale", "0.1", "0.2") == parse("--crop_scale", "0.1", "0.2")


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epoch", "3"], "Unrecognized options: --epoch, 3; did you mean --epochs?"),
        (["--zzz"], "Unrecognized options: --zzz"),
        (["stray"], "Unrecognized options: stray"),
        (["--fast", "maybe"], "Error parsing --fast: 'maybe' is neither true nor false"),
        (["--fast"], "Missing value for argument '--fast'. Expected 1 values."),
        (["--epochs", "1.5"], "Error parsing --epochs: invalid literal for int() with base 10: '1.5'"),
        (["--crop_scale", "0.4"], "Missing value for argument '--crop_scale'. Expected 2 values."),
        (
            ["--kind", "blue"],
            "invalid choice 'blue' for argument '--kind'. Expected one of ('red', 'green').",
        ),
    ],
)
@pytest.mark.parametrize(("stream", "encoding"), [(Terminal, "utf-8"), (io.TextIOWrapper, "ascii")])
def test_a_wrong_option_is_one_sentence_on_any_terminal(arguments, sentence, stream, encoding, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", stream(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as refusal:
        parse(*arguments)
    assert str(refusal.value) == f"{sentence} (--help lists the options)"


def test_a_users_mistake_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    def run(options):
        raise UserError(f"{options.epochs} epochs are too many")

    assert exit_of(monkeypatch, run, "--epochs", "20") == 2
    assert capsys.readouterr() == ("", "prog: 20 epochs are too many\n")
    assert exit_of(monkeypatch, run, "--epocs", "20") == 2
    assert capsys.readouterr().err.startswith(
        "prog: Unrecognized options: --epocs, 20; did you mean --epochs?"
    )


def test_a_run_that_stops_itself_exits_with_1_and_an_interrupted_one_with_130(monkeypatch, capsys):
    def stop(options):
        raise RunStopped("collapsed")

    def interrupt(options):
        raise KeyboardInterrupt

    assert exit_of(monkeypatch, stop) == 1 and capsys.readouterr().err == "prog: collapsed\n"
    assert exit_of(monkeypatch, interrupt) == 130 and capsys.readouterr().err == "\nprog: interrupted\n"


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(ZeroDivisionError):
        command(Options, lambda options: 1 / 0, prog="prog", description="")


@pytest.mark.parametrize("written", [["--preset", "tiny"], ["--preset=tiny"]])
def test_a_preset_sets_defaults_and_what_is_given_beside_it_wins(written):
    for arguments in ([*written, "--epochs", "3"], ["--epochs", "3", *written]):
        options = train_options(*arguments)
        expected = {**PRESETS["tiny"], "epochs": 3, "preset": "tiny"}
        assert options == dataclasses.replace(TrainOptions(), **expected)
    default = train_options("--preset", "tiny", "--out_dim", "65536", "--blur", "1")
    assert (default.out_dim, default.blur) == (65536, 1.0)  # also when it is the paper's value


def test_a_preset_is_printed_as_options_that_mean_the_same():
    assert train_options(*preset_text("tiny").split()) == dataclasses.replace(
        TrainOptions(), **PRESETS["tiny"]
    )


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"^unknown preset 'tinny'; did you mean tiny\?$"):
        train_options("--preset", "tinny")


_HELP = """
import socket, sys
def refuse(*_, **__): raise AssertionError("network")
socket.socket.connect = refuse
sys.argv = ["dino.train", "--help"]
from dino.train import main
try:
    main()
except SystemExit as stop:
    heavy = {"torch", "torchvision", "timm", "numpy", "matplotlib", "sklearn"} & set(sys.modules)
    print("LOADED", heavy or None, stop.code)
"""


def test_help_needs_neither_torch_nor_network():
    done = subprocess.run([sys.executable, "-c", _HELP], capture_output=True, text=True, timeout=60)
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
