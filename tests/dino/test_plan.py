import dataclasses
import re

import pytest
import torch
from PIL import Image

from dino.multicrop import View
from dino.plan import (
    check_options,
    create_distillation,
    create_multicrop,
    create_plan,
    create_views,
    share_of_step,
)
from dino.presets import PRESETS
from dino.runtime import distributed
from dino.runtime.options import UserError
from dino.train_options import TrainOptions, preset_defaults
from xcit.layers import DropPath

TINY = TrainOptions(
    arch="xcit_pico_3_p8",
    out_dim=16,
    head_hidden_dim=8,
    bottleneck_dim=4,
    global_crops_size=16,
    local_crops_size=8,
)
CPU = torch.device("cpu")


def test_the_plan_is_the_originals_for_its_defaults():
    options = TrainOptions(
        epochs=20, batch_size_per_gpu=64, warmup_teacher_temp_epochs=3, teacher_temp=0.07, freeze_last_layer=2
    )
    plan = create_plan(options, count=1000, global_batch=128)
    assert plan.steps_per_epoch == 7 and plan.steps == 140  # a batch that is not full is dropped
    assert all(len(rates) == 140 for rates in (plan.lr, plan.weight_decay, plan.momentum))
    assert plan.lr[0] == 0 and plan.lr[69] == plan.lr.max() == 5e-4 * 128 / 256  # last step of the warm-up
    assert plan.lr[-1] == pytest.approx(options.min_lr, rel=0.2)
    first, held, free, last = (plan.rates(step) for step in (0, 13, 14, 139))
    assert (first.weight_decay, first.momentum) == pytest.approx((0.04, 0.996))
    assert last.weight_decay == pytest.approx(0.4, abs=1e-4) and last.momentum == pytest.approx(1, abs=1e-5)
    assert held.hold_last_layer and not free.hold_last_layer
    temperatures = [plan.rates(step).teacher_temperature for step in (0, 6, 7, 13, 14, 139)]
    assert temperatures == pytest.approx([0.04, 0.04, 0.055, 0.055, 0.07, 0.07])


def test_an_epoch_without_a_step_says_which_number_to_change():
    with pytest.raises(UserError) as refusal:
        create_plan(TrainOptions(), count=63, global_batch=64)
    assert str(refusal.value) == (
        "an epoch has no step: 63 pictures do not fill one batch of 64; lower --batch_size_per_gpu to 63 or less"
    )
    assert create_plan(TrainOptions(), count=63, global_batch=63).steps == 100


@pytest.mark.parametrize(
    ("processes", "given", "share"),
    [
        (1, {"batch_size_per_gpu": 64}, (64, 64)),
        (8, {"batch_size_per_gpu": 64}, (512, 64)),
        (2, {"batch_size_per_gpu": 64, "accumulate": 8}, (1024, 64)),
        (8, {"batch_size": 1024}, (1024, 128)),
        (2, {"batch_size": 1024, "accumulate": 16, "batch_size_per_gpu": 5}, (1024, 32)),
    ],
)
def test_a_step_is_shared_by_processes_and_parts(processes, given, share, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    assert share_of_step(dataclasses.replace(TrainOptions(), **given)) == share


@pytest.mark.parametrize("batch_size", [2, 1021])
def test_a_batch_that_cannot_be_shared_equally_is_refused(batch_size, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError) as refusal:
        share_of_step(dataclasses.replace(TrainOptions(), batch_size=batch_size, accumulate=2))
    assert str(refusal.value) == (
        f"--batch_size {batch_size} cannot be shared equally by 2 processes with --accumulate 2: "
        "give a multiple of 4"
    )


def test_too_large_a_global_batch_is_named_by_its_flag():
    options = dataclasses.replace(TrainOptions(), batch_size=64)
    with pytest.raises(UserError, match="lower --batch_size to 63 or less"):
        create_plan(options, count=63, global_batch=64)


def test_continuing_needs_weights_to_continue_from():
    with pytest.raises(UserError, match="--preset continue starts from weights: name them with --init_from"):
        check_options(dataclasses.replace(TrainOptions(), preset="continue"))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_accepted(preset):
    init_from = "weights.pth" if preset == "continue" else ""
    options = preset_defaults([f"--preset={preset}"])
    check_options(dataclasses.replace(options, preset=preset, init_from=init_from))


COUNTS = ("epochs", "batch_size_per_gpu", "accumulate", "global_crops_size", "local_crops_size")
WIDTHS = ("head_hidden_dim", "bottleneck_dim", "patch_size", "knn_max_pictures")
NOT_NEGATIVE = ("local_crops_number", "num_workers", "clip_grad", "koleo_weight", "freeze_last_layer", "seed")
RATES = ("lr", "min_lr", "weight_decay", "weight_decay_end", "blur", "eval_size")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *((name, 0, "must be 1 or more, got 0") for name in (*COUNTS, *WIDTHS)),
        *((name, -1, "must be 0 or more, got -1") for name in (*NOT_NEGATIVE, *RATES)),
        ("out_dim", 1, "must be 2 or more, got 1"),
        ("seed", 2**63, f"must be below 2^63, got {2**63}"),
        ("lr", float("nan"), "must be 0 or more, got nan"),
        ("warmup_epochs", 101, "must lie between 0 and --epochs (100), got 101"),
        ("warmup_epochs", -1, "must lie between 0 and --epochs (100), got -1"),
        ("warmup_teacher_temp_epochs", 101, "must lie between 0 and --epochs (100), got 101"),
        ("global_crops_scale", (0.0, 1.0), "must be two rising numbers in (0, 1], got 0.0 1.0"),
        ("global_crops_scale", (0.5, 0.4), "must be two rising numbers in (0, 1], got 0.5 0.4"),
        ("local_crops_scale", (0.5, 1.1), "must be two rising numbers in (0, 1], got 0.5 1.1"),
        ("teacher_temp", 0, "must be above 0, got 0"),
        ("warmup_teacher_temp", -0.1, "must be above 0, got -0.1"),
        ("momentum_teacher", 1.1, "must lie in [0, 1], got 1.1"),
        ("grayscale", -0.1, "must lie in [0, 1], got -0.1"),
        ("drop_path_rate", 1.0, "must lie in [0, 1), got 1.0"),
        *(
            ("color_jitter", jitter, "must be four numbers from 0 up, the last at most 0.5, got " + text)
            for jitter, text in (((0.4, 0.4, 0.2, 0.6), "0.4 0.4 0.2 0.6"), ((-1, 0, 0, 0), "-1 0 0 0"))
        ),
    ],
)
def test_what_cannot_work_is_refused(name, value, rule):
    options = dataclasses.replace(TrainOptions(), **{name: value})
    with pytest.raises(UserError, match=f"^{re.escape(f'--{name} {rule}')}$"):
        check_options(options)


def test_the_views_are_what_the_options_ask_for():
    options = dataclasses.replace(
        TrainOptions(),
        global_crops_size=48,
        global_crops_scale=(0.5, 0.9),
        local_crops_number=3,
        local_crops_size=24,
        local_crops_scale=(0.1, 0.3),
        color_jitter=(0.1, 0.2, 0.3, 0.4),
        grayscale=0.7,
        blur=0.5,
    )
    colours = {"jitter": (0.1, 0.2, 0.3, 0.4), "grayscale": 0.7}
    assert create_multicrop(options).views == [
        View(48, (0.5, 0.9), blur=0.5, solarize=0.0, **colours),
        View(48, (0.5, 0.9), blur=0.05, solarize=0.2, **colours),
        *[View(24, (0.1, 0.3), blur=0.25, solarize=0.0, **colours)] * 3,
    ]
    papers = [(view.size, view.scale, view.blur) for view in create_multicrop(TrainOptions()).views]
    assert papers == [(224, (0.4, 1.0), 1.0), (224, (0.4, 1.0), 0.1), *[(96, (0.05, 0.4), 0.5)] * 8]


@pytest.mark.parametrize(
    ("augment_on", "device", "left"),
    [
        ("auto", "cpu", False),
        ("auto", "mps", False),
        ("auto", "cuda:1", True),
        ("workers", "cuda", False),
        ("device", "cpu", True),
    ],
)
def test_distortions_are_left_to_the_device_where_the_options_say_so(augment_on, device, left):
    options = dataclasses.replace(TrainOptions(), augment_on=augment_on, local_crops_number=1)
    views, distortions = create_views(options, torch.device(device))(Image.new("RGB", (50, 40)))
    assert [tuple(view.shape) for view in views] == [(3, 224, 224), (3, 224, 224), (3, 96, 96)]
    assert (distortions is not None) == left


def test_the_method_is_what_the_options_ask_for():
    options = dataclasses.replace(
        TINY,
        centering="sinkhorn_knopp",
        koleo_weight=0.3,
        clip_grad=1.5,
        optimizer="sgd",
        use_bn_in_head=True,
    )
    parts = create_distillation(options, CPU, "bf16")
    assert (parts.centering, parts.koleo_weight, parts.clip_grad) == ("sinkhorn_knopp", 0.3, 1.5)
    assert isinstance(parts.optimizer, torch.optim.SGD) and parts.precision == "bf16"
    assert any(isinstance(module, torch.nn.BatchNorm1d) for module in parts.student.head.modules())
    assert parts.student.head.last_layer.weight_v.shape == (16, 4)
    default = create_distillation(TINY, CPU, "fp32")
    assert (default.centering, default.koleo_weight, default.clip_grad) == ("center", 0.0, 3.0)


def test_student_and_teacher_start_alike_and_only_the_student_drops_paths():
    parts = create_distillation(dataclasses.replace(TINY, drop_path_rate=0.3), CPU, "fp32")
    states = [network.state_dict() for network in (parts.student, parts.teacher)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    rates = [
        {module.drop_prob for module in network.modules() if isinstance(module, DropPath)}
        for network in (parts.student, parts.teacher)
    ]
    assert rates == [{0.3}, {0.0}]
    assert parts.student.training and parts.teacher.training


def test_the_seed_decides_the_weights():
    weights = [
        create_distillation(dataclasses.replace(TINY, seed=seed), CPU, "fp32").student.head.mlp[0].weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"arch": "vit_tiny", "global_crops_size": 32, "local_crops_size": 20},
            "--local_crops_size 20: must be a multiple of the patch's side, 16 pixels; 16 is near",
        ),
        (
            {"arch": "mixer_s32_224", "global_crops_size": 96},
            "--global_crops_size 96: MlpMixer takes pictures of 224 x 224 pixels only; "
            "XCiT, vit_* and convolutional networks take all sizes",
        ),
        (
            {"arch": "dla46_c", "grad_checkpointing": True},
            "--grad_checkpointing true: dla46_c cannot do that",
        ),
    ],
)
def test_backbones_that_do_not_fit_the_options_are_refused(changes, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        create_distillation(dataclasses.replace(TINY, **changes), CPU, "fp32")
