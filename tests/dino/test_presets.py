import dataclasses
import re
import sys

import pytest

import xcit
from dino import train
from dino.plan import check_options, create_plan
from dino.presets import PRESETS, PURPOSES
from dino.runtime.options import UserError, parse_options
from dino.train_options import TrainOptions, preset_defaults, preset_lines
from tests.dino.small_runs import TINY

OPTIONS = {field.name: field.default for field in dataclasses.fields(TrainOptions)}

IMAGENET = 1_281_167

# VISSL's configurations: GPUs, pictures on each, learning rate at the peak and at the end, drop path, share of the
# picture that is the least of a global and the most of a local view, local views.
PUBLISHED = {
    "xcit_small_12_p16": (16, 64, 1e-3, 4e-5, 0.05, 0.3, 8),
    "xcit_medium_24_p16": (32, 32, 1e-3, 1e-5, 0.15, 0.3, 8),
    "xcit_medium_24_p8": (96, 10, 9.375e-4, 1e-5, 0.15, 0.32, 6),
    "xcit_large_24_p16": (80, 14, 1.09e-3, 1e-5, 0.3, 0.32, 8),
    "xcit_large_24_p8": (128, 4, 5e-4, 1e-5, 0.3, 0.32, 8),
}
MODELS = [*PUBLISHED, "xcit_small_12_p8"]

# The numbers that benchmarks/results/learning_*.json were measured with.
TINY_PRESET = {
    "arch": "xcit_pico_3_p8",
    "out_dim": 128,
    "head_hidden_dim": 512,
    "bottleneck_dim": 128,
    "centering": "sinkhorn_knopp",
    "koleo_weight": 0.05,
    "teacher_temp": 0.02,
    "warmup_teacher_temp": 0.02,
    "momentum_teacher": 0.99,
    "lr": 0.024,
    "warmup_epochs": 2,
    "weight_decay_end": 0.04,
    "drop_path_rate": 0.0,
    "global_crops_size": 48,
    "global_crops_scale": (0.5, 1.0),
    "local_crops_size": 24,
    "local_crops_scale": (0.1, 0.5),
    "local_crops_number": 4,
    "color_jitter": (0.4, 0.4, 0.8, 0.5),
    "grayscale": 0.4,
    "blur": 0.0,
    "batch_size_per_gpu": 32,
    "epochs": 8,
    "freeze_last_layer": 0,
    "knn_freq": 4,
    "eval_size": 64,
}


def train_options(*arguments):
    return parse_options(
        TrainOptions, arguments, prog="prog", description="", default=preset_defaults(arguments)
    )


def settings_in(line):
    return line.partition(": ")[0].split()


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_is_an_option_with_a_value_of_its_kind(name):
    settings = [item for group in PRESETS[name].groups for item in group.settings.items()]
    assert len(settings) == len(PRESETS[name].settings)  # none is set twice
    for option, value in settings:
        assert type(value) is type(OPTIONS[option]), option
        if isinstance(value, tuple):
            assert [type(part) for part in value] == [type(part) for part in OPTIONS[option]], option


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_says_names_only_options_that_exist(name):
    preset = PRESETS[name]
    said = " ".join([preset.purpose, preset.status, *(group.why for group in preset.groups)])
    assert set(re.findall(r"--(\w+)", said)) <= OPTIONS.keys()
    assert preset.name == name and re.match("measured|published|reasoned|the recipe of", preset.status)


@pytest.mark.parametrize(
    ("name", "pictures", "processes"),
    [
        ("paper", IMAGENET, 8),
        ("tiny", 2_000, 1),
        ("small", 10_000, 1),
        ("small", 100_000, 1),
        ("medium", 100_000, 4),
        ("medium", 1_000_000, 4),
        ("imagenet", IMAGENET, 8),
        ("continue", 1_000, 1),
        *((name, IMAGENET, PUBLISHED[name][0]) for name in PUBLISHED),
        ("xcit_small_12_p8", IMAGENET, 32),
    ],
)
def test_a_preset_makes_a_plan_for_the_pictures_that_it_is_meant_for(name, pictures, processes):
    options = train_options("--preset", name, "--data_path", "demo", "--init_from", "weights.pth")
    check_options(options)
    plan = create_plan(options, pictures, options.batch_size_per_gpu * processes)
    assert options.arch in xcit.list_models(all=True)
    assert plan.steps >= 10 * plan.held_steps


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_models_preset_is_its_published_recipe(name):
    gpus, batch, peak, last, drop_path, share, local_views = PUBLISHED[name]
    options = train_options("--preset", name)
    assert (options.arch, options.batch_size_per_gpu, options.epochs) == (name, batch, 300)
    assert f"{gpus} GPUs x {batch} pictures" in PRESETS[name].purpose
    plan = create_plan(options, IMAGENET, gpus * batch)
    epoch = plan.steps_per_epoch
    assert plan.lr.max() == pytest.approx(peak, rel=5e-3) and plan.lr.argmax() in (10 * epoch - 1, 10 * epoch)
    assert plan.lr[-1] == pytest.approx(last, rel=1e-3)
    temperatures = [plan.teacher_temperature[step] for step in (0, 29 * epoch, plan.steps - 1)]
    assert temperatures == pytest.approx([0.04, 0.07, 0.07]) and plan.teacher_temperature[28 * epoch] < 0.07
    assert (plan.weight_decay[0], plan.weight_decay[-1]) == pytest.approx((0.04, 0.4))
    assert (plan.momentum[0], plan.momentum[-1]) == pytest.approx((0.996, 1))
    assert plan.held_steps == epoch
    assert (options.norm_last_layer, options.drop_path_rate, options.out_dim) == (False, drop_path, 65536)
    assert options.global_crops_scale == (share, 1.0) and options.local_crops_scale == (0.05, share)
    assert options.local_crops_number == local_views


def test_small_12_p8_is_medium_24_p8_but_for_what_belongs_to_the_size():
    small, medium = (PRESETS[name].settings for name in ("xcit_small_12_p8", "xcit_medium_24_p8"))
    differing = {name for name in small if small[name] != medium[name]}
    assert differing == {"arch", "batch_size_per_gpu", "drop_path_rate"}
    assert small["drop_path_rate"] == PRESETS["xcit_small_12_p16"].settings["drop_path_rate"]
    assert "no configuration is public" in PRESETS["xcit_small_12_p8"].status


def test_imagenet_is_the_recipe_of_small_12_p16_on_eight_gpus():
    ours, theirs = (PRESETS[name].settings for name in ("imagenet", "xcit_small_12_p16"))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"batch_size_per_gpu"}
    assert 8 * ours["batch_size_per_gpu"] == 16 * theirs["batch_size_per_gpu"]


def test_tiny_is_what_was_measured_and_paper_sets_nothing():
    assert PRESETS["tiny"].settings == TINY_PRESET
    assert PRESETS["paper"].settings == {}
    assert train_options() == TrainOptions() == train_options("--preset", "paper")


def test_continuing_is_gentler_than_starting_and_takes_any_backbone():
    settings = PRESETS["continue"].settings
    for name in ("lr", "epochs", "warmup_epochs", "clip_grad", "weight_decay_end"):
        assert settings[name] < OPTIONS[name], name
    assert settings["momentum_teacher"] > OPTIONS["momentum_teacher"]
    assert settings["freeze_last_layer"] >= settings["warmup_epochs"] and settings["knn_freq"] == 1
    assert not {"arch", "patch_size", "batch_size_per_gpu", "data_path", "init_from"} & settings.keys()


@pytest.mark.parametrize("written", [["--preset", "tiny"], ["--preset=tiny"]])
def test_a_preset_sets_defaults_and_what_is_given_beside_it_wins(written):
    for arguments in ([*written, "--epochs", "3"], ["--epochs", "3", *written]):
        options = train_options(*arguments)
        expected = {**TINY_PRESET, "epochs": 3, "preset": "tiny"}
        assert options == dataclasses.replace(TrainOptions(), **expected)
    default = train_options("--preset", "tiny", "--out_dim", "65536", "--blur", "1")
    assert (default.out_dim, default.blur) == (65536, 1.0)  # also when it is the paper's value


@pytest.mark.parametrize("name", PRESETS)
def test_the_printed_settings_mean_the_same_on_a_command_line(name):
    options = train_options("--preset", name)
    printed = [word for line in preset_lines(options)[1:] for word in settings_in(line)]
    assert train_options(*printed) == dataclasses.replace(options, preset="paper")


@pytest.mark.parametrize("name", PRESETS)
def test_each_group_is_a_line_with_its_reason(name):
    preset = PRESETS[name]
    purpose, *lines = preset_lines(train_options("--preset", name))
    assert purpose == f"{name}: {preset.purpose} ({preset.status})"
    assert len(lines) == len(preset.groups)
    for line, group in zip(lines, preset.groups, strict=True):
        assert [word[2:] for word in settings_in(line) if word.startswith("--")] == list(group.settings)
        assert line.endswith(f": {group.why}") and len(group.why) > 10


def test_what_is_given_beside_the_preset_is_not_printed_as_set_by_it():
    alone = preset_lines(train_options("--preset", "continue"))
    beside = preset_lines(train_options("--preset", "continue", "--lr", "1e-4", "--clip_grad", "0"))
    gone = [line for line in alone if line not in beside]
    assert [settings_in(line) for line in gone] == [
        ["--lr", "5e-05", "--warmup_epochs", "2"],
        ["--clip_grad", "1.0"],
    ]
    new = [line for line in beside if line not in alone]
    assert [settings_in(line) for line in new] == [["--warmup_epochs", "2"]]


@pytest.mark.usefixtures("quick")
def test_a_run_begins_with_its_preset(pictures, tmp_path, monkeypatch, capsys):
    given = {
        **TINY,
        "data_path": pictures,
        "output_dir": tmp_path,
        "epochs": 2,
        "knn_freq": 0,
        "saveckp_freq": 0,
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["dino-train", "--preset", "tiny", *arguments])
    train.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("preset:    tiny: thousands of pictures, minutes on a CPU (measured: ")
    assert "           --koleo_weight 0.05: features kept apart" in lines
    assert not any("--epochs" in line or "--local_crops_size" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tinny", "did you mean tiny?"),
        ("xcit_smal_12_p16", "did you mean xcit_small_12_p16?"),
        ("?", f"known: {', '.join(PRESETS)}"),
    ],
)
def test_an_unknown_preset_is_refused(name, hint):
    with pytest.raises(UserError) as error:
        preset_defaults(["--preset", name])
    assert str(error.value) == f"unknown preset '{name}'; {hint}"


def test_help_lists_the_presets_with_their_purposes():
    described = {field.name: field.metadata for field in dataclasses.fields(TrainOptions)}["preset"]
    assert PURPOSES in described["help"] and described["choices"] == tuple(PRESETS)
    for name in set(PRESETS) - set(MODELS):
        assert f"{name}: {PRESETS[name].purpose}" in PURPOSES, name
