"""The command on a few pictures: trained, continued, evaluated, fine-tuned, and asked for what cannot be."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import xcit
from dino.downstream.classification.options import (
    ClassifyOptions,
    check_classify_options,
    preset_defaults,
)
from dino.downstream.classification.rates import create_optimizer, create_scheduler
from dino.downstream.classification.task import classify
from dino.downstream.classify import main
from dino.downstream.training import Training
from dino.runtime import checkpoint, distributed, run_log
from dino.runtime.options import UserError, parse_options
from tests.dino.small_runs import assert_same, write_pictures
from tests.xcit.test_model import randomised

PICO = "xcit_pico_3_p8"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    monkeypatch.setattr(run_log, "_tensorboard", lambda folder: None)
    monkeypatch.setattr("dino.downstream.training.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", count=16)
    write_pictures(root / "val", count=6, seed=1)
    return root


def options(pictures, folder, **changes):
    small = preset_defaults(["--preset", "small"])
    start = replace(
        small,
        data_path=str(pictures),
        output_dir=str(folder),
        model=PICO,
        input_size=16,
        batch_size=8,
        epochs=2,
        warmup_epochs=0,
        lr=0.05,
        num_workers=0,
        device="cpu",
        precision="fp32",
    )
    return replace(start, **changes)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "usable_cores", lambda: 1)
        patch.setattr(run_log, "_tensorboard", lambda folder: None)
        classify(options(pictures, folder, epochs=4))
    return folder


def test_two_colours_are_learned_and_what_was_measured_is_kept(trained):
    assert len(rows(trained)) == 4
    last = rows(trained)[-1]
    assert last["test_acc1"] == 100.0 and last["train_loss"] < rows(trained)[0]["train_loss"]
    entry = json.loads((trained / "results.json").read_text())["classification"]
    assert entry["last"] == last and entry["pictures"] == {"train": 32, "val": 12}
    for name in ("curves.png", "confusion.png", "confusion.csv", "best_model.pth", "checkpoint.pth"):
        assert (trained / name).stat().st_size > 0, name
    stored = checkpoint.load(trained / "checkpoint.pth")
    assert stored["classes"] == ["cats", "dogs"]
    assert {"model", "optimizer", "epoch", "args", "model_ema"} <= stored.keys() and stored["epoch"] == 4


def test_the_best_network_is_evaluated_by_its_own_file(trained, pictures, tmp_path, capsys):
    best = max(max(row["test_acc1"], row["ema_test_acc1"]) for row in rows(trained))
    weights = str(trained / "best_model.pth")
    classify(options(pictures, tmp_path, model="auto", eval=True, weights=weights))
    out = capsys.readouterr().out
    assert f"* Acc@1 {best:.3f}" in out and "Accuracy of the network on the 12 test images" in out
    entry = json.loads((tmp_path / "results.json").read_text())["classification, evaluated"]
    assert entry["results"]["acc1"] == best and entry["arch"] == PICO


def test_the_moving_average_of_a_checkpoint_is_evaluated_too(trained, pictures, tmp_path):
    weights = str(trained / "checkpoint.pth")
    for key, measure in (("model", "test_loss"), ("model_ema", "ema_test_loss")):
        folder = tmp_path / key
        classify(options(pictures, folder, eval=True, weights=weights, checkpoint_key=key))
        found = json.loads((folder / "results.json").read_text())["classification, evaluated"]["results"]
        assert found["loss"] == pytest.approx(rows(trained)[-1][measure], rel=1e-6)


def test_a_run_in_two_parts_is_the_run_in_one(trained, pictures, tmp_path):
    """A schedule is that of the whole run from the start."""
    steps = []
    whole = options(pictures, tmp_path, epochs=4)
    step = Training._take_step

    def cut(self, content):
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(self.step)
        step(self, content)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_take_step", cut)
        classify(whole)
    classify(whole)
    found, wanted = (checkpoint.load(folder / "checkpoint.pth") for folder in (tmp_path, trained))
    for part in ("model", "model_ema", "optimizer", "progress", "epoch"):
        assert_same(found[part], wanted[part])
    assert rows(tmp_path) == rows(trained)


@pytest.mark.parametrize(
    "changes",
    [
        {"mixup": 0.8, "cutmix": 1.0, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "repeated_aug": True},
        {"layer_decay": 0.7, "opt": "lamb"},
        {"opt": "sgd", "sched": "step", "model_ema": False},
        {"grad_checkpointing": True, "drop_path": 0.2, "sched": "poly"},
        {"model": "resnet10t", "input_size": 32},
    ],
)
def test_every_ingredient_of_the_recipe_trains(pictures, tmp_path, changes):
    classify(options(pictures, tmp_path, epochs=1, **changes))
    (row,) = rows(tmp_path)
    assert np.isfinite(row["train_loss"]) and row["skipped_steps"] == 0
    assert ("ema_test_acc1" in row) == changes.get("model_ema", True)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_trained_network_teaches_another(trained, pictures, tmp_path, kind):
    teacher = {"teacher_model": PICO, "teacher_path": str(trained / "best_model.pth")}
    classify(options(pictures, tmp_path, epochs=1, distillation_type=kind, **teacher))
    (row,) = rows(tmp_path)
    assert row["train_loss"] == pytest.approx(row["train_labels"] + row["train_distillation"], rel=1e-4)
    assert row["train_distillation"] > 0


def test_a_checkpoint_of_the_original_goes_on_as_if_it_were_ours(trained, pictures, tmp_path):
    stored = checkpoint.load(trained / "checkpoint.pth")
    del stored["progress"], stored["classes"]
    stored["epoch"] = 3  # the last of 4
    checkpoint.save_atomically(stored, tmp_path / "original.pth")
    folder = tmp_path / "run"
    classify(options(pictures, folder, epochs=5, resume=str(tmp_path / "original.pth")))
    assert [row["epoch"] for row in rows(folder)] == [4]


def test_published_weights_are_evaluated_as_they_were_measured(pictures, tmp_path, monkeypatch, capsys):
    """On the whole picture, with ImageNet's 1,000 outputs; without ImageNet that cannot be a number to believe."""
    torch.manual_seed(0)
    model = randomised(xcit.create_model("xcit_nano_12_p16", num_classes=1000)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    monkeypatch.setattr("xcit.weights.fetch", lambda url: tmp_path / "weights.pth")
    imagenet = tmp_path / "imagenet" / "val"
    write_pictures(imagenet, classes=("n01440764", "n15075141"), count=3)
    asked = options(tmp_path / "imagenet", tmp_path / "out", eval=True, weights="xcit_nano_12_p16_224_dist")
    classify(replace(asked, model="auto", input_size=32, full_crop="auto"))
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["classification, evaluated"]
    assert entry["preprocessing"]["resize_ratio"] == 1.0 and entry["arch"] == "xcit_nano_12_p16"
    capsys.readouterr()
    classify(replace(asked, model="auto", input_size=32, full_crop="false"))
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["classification, evaluated"]
    assert entry["preprocessing"]["resize_ratio"] == pytest.approx(256 / 224)


ORIGINAL = (
    "--eval --model xcit_nano_12_p16 --input-size 384 --full_crop --pretrained weights.pth --batch-size 64 "
    "--no-model-ema --no-repeated-aug --drop-path 0.05 --data-set IMNET --data-path /data --opt-betas 0.9 0.95 "
    "--dist-eval --no-pin-mem --num_workers 4 --dr 0.2 --warmup-epochs 3 --output_dir out"
)


def test_a_command_line_of_the_original_is_understood():
    parsed = parse_options(
        ClassifyOptions, ORIGINAL.split(), prog="classify", description="", default=ClassifyOptions()
    )
    assert parsed.eval and parsed.full_crop == "true" and parsed.input_size == 384
    assert not parsed.model_ema and not parsed.repeated_aug and not parsed.pin_mem
    assert parsed.opt_betas == (0.9, 0.95) and parsed.decay_rate == 0.2 and parsed.data_path == "/data"


def test_the_defaults_are_the_originals():
    given = {
        **{
            "batch_size": 64,
            "epochs": 400,
            "input_size": 224,
            "drop": 0.0,
            "drop_path": 0.1,
            "model_ema": True,
        },
        **{
            "model_ema_decay": 0.99996,
            "opt": "adamw",
            "opt_eps": 1e-8,
            "momentum": 0.9,
            "weight_decay": 0.05,
        },
        **{
            "sched": "cosine",
            "lr": 5e-4,
            "warmup_lr": 1e-6,
            "min_lr": 1e-5,
            "warmup_epochs": 5,
            "decay_rate": 0.1,
        },
        **{
            "color_jitter": 0.4,
            "aa": "rand-m9-mstd0.5-inc1",
            "smoothing": 0.1,
            "train_interpolation": "bicubic",
        },
        **{
            "repeated_aug": True,
            "reprob": 0.25,
            "remode": "pixel",
            "recount": 1,
            "mixup": 0.8,
            "cutmix": 1.0,
        },
        **{
            "mixup_prob": 1.0,
            "mixup_switch_prob": 0.5,
            "mixup_mode": "batch",
            "teacher_model": "regnety_160",
        },
        **{
            "distillation_type": "none",
            "distillation_alpha": 0.5,
            "distillation_tau": 1.0,
            "data_set": "IMNET",
        },
        **{"inat_category": "name", "seed": 0, "num_workers": 10, "test_freq": 1, "clip_grad": 0.0},
    }
    for name, value in given.items():
        assert getattr(ClassifyOptions(), name) == value, name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, "--batch_size must be 1 or more, got 0"),
        ({"mixup": 0.8, "batch_size": 3}, "--batch_size must be even, got 3"),
        ({"drop_path": 1.0}, r"--drop_path must lie in \[0, 1\), got 1.0"),
        ({"layer_decay": 0.0}, r"--layer_decay must lie in \(0, 1\]"),
        ({"warmup_epochs": 9, "epochs": 3}, r"--warmup_epochs must be at most --epochs \(3\), got 9"),
        ({"crop_scale": (0.5, 0.1)}, "--crop_scale must be two rising numbers"),
        ({"lr_noise": (0.1,)}, "--lr_noise must be two numbers, or left out, got 0.1"),
        ({"weights": "a", "pretrained": "b"}, "two names of one option"),
        ({"eval": True}, "--eval needs weights"),
        ({"wait_minutes": 0.0}, "--wait_minutes must be above 0"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_classify_options(replace(ClassifyOptions(), **{"mixup": 0.0, "cutmix": 0.0, **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drop": 0.1}, "XCiT has no dropout; use --drop_path"),
        ({"opt": "nonsense"}, "--opt nonsense with these settings: "),
        ({"batch_size": 64}, "32 pictures do not fill one batch of 64; lower --batch_size to 32"),
        ({"data_path": "/nowhere"}, "/nowhere is no file or folder"),
        ({"weights": "/nowhere.pth"}, "there is no file /nowhere.pth"),
        ({"model": "xcit_nano"}, "unknown model 'xcit_nano'; did you mean"),
        ({"data_set": "CIFAR"}, "did you mean CIFAR10"),
        ({"data_set": "IMNET22k"}, "which the original names but does not implement"),
        ({"resume": "/nowhere.pth"}, "no checkpoint at /nowhere.pth"),
        ({"distillation_type": "hard", "teacher_model": "nobody"}, "timm's weights cannot be had"),
        ({"model": "vit_tiny", "input_size": 17}, "must be a multiple of the patch's side"),
    ],
)
def test_what_does_not_fit_is_one_sentence(pictures, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        classify(options(pictures, tmp_path, **changes))


def test_the_command_says_so_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["classify", "--epochs", "0", f"--output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "dino-classify: --epochs must be 1 or more, got 0\n"


def test_the_rate_follows_the_batch_and_warms_up_from_the_first_step():
    chosen = replace(ClassifyOptions(), lr=5e-4, epochs=10, warmup_epochs=2)
    optimizer = create_optimizer(chosen, xcit.create_model(PICO, num_classes=2), 1024)
    scheduler = create_scheduler(chosen, optimizer, 50)
    rates = []
    for step in range(500):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6)
    warm = 1e-6 + (1e-3 - 1e-6) * 60 / 100
    assert rates[60] == pytest.approx(warm)
    for step in (100, 300, 499):
        expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * step / 500))
        assert rates[step] == pytest.approx(expected, rel=1e-6)


def test_biases_and_scales_go_without_decay_and_early_layers_with_less_rate():
    network = xcit.create_model(PICO, num_classes=2)
    chosen = replace(ClassifyOptions(), layer_decay=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {}
    for group in create_optimizer(chosen, network, 512).param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["weight_decay"], group["lr_scale"])
    assert len(found) == len(names)
    assert found["blocks.0.attn.qkv.bias"][0] == found["norm.weight"][0] == found["blocks.0.gamma1"][0] == 0
    assert found["cls_token"][0] == 0 and found["blocks.0.mlp.fc1.weight"][0] == 0.05
    order = [
        "patch_embed.proj.0.0.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.2.mlp.fc1.weight",
        "head.weight",
    ]
    scales = [found[name][1] for name in order]
    assert scales == sorted(scales) and len(set(scales)) == 4 and scales[-1] == 1.0
