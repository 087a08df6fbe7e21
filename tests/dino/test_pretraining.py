"""Whole runs of a tiny network on a few pictures: what they write, and that stopping and looking change nothing."""

import argparse
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xcit
from dino import pretraining
from dino.distillation import SelfDistillation
from dino.evaluation.features import extract_features
from dino.evaluation.knn import knn_accuracy
from dino.monitor import Monitor
from dino.pretraining import Pretraining, pretrain
from dino.runtime import checkpoint, distributed, run_log
from dino.runtime.backbones import create_backbone, load_backbone_weights
from dino.runtime.options import RunStopped, UserError
from dino.runtime.pictures import open_pictures
from dino.train import TrainOptions

CPU = torch.device("cpu")


class Killed(BaseException):
    """As sudden as a signal: nothing in the program catches it."""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    monkeypatch.setattr(run_log, "_tensorboard", lambda folder: None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """A run of two epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "usable_cores", lambda: 1)
        pretrain(tiny(pictures, folder))
    return folder


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
        arch="xcit_pico_3_p8",
        out_dim=16,
        head_hidden_dim=32,
        bottleneck_dim=16,
        global_crops_size=16,
        local_crops_size=16,
        local_crops_number=1,
        batch_size_per_gpu=4,
        epochs=2,
        warmup_epochs=1,
        lr=0.1,
        freeze_last_layer=1,
        precision="fp32",
        device="cpu",
        num_workers=0,
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


def test_a_run_writes_checkpoints_log_curves_and_attention_sheets(finished):
    written = {str(path.relative_to(finished)) for path in finished.rglob("*.p*")}
    assert written == {
        "checkpoint.pth",
        "checkpoint.previous.pth",
        "best_knn.pth",
        "curves.png",
        *(f"attention/epoch_000{epochs}.png" for epochs in range(3)),
    }
    with Image.open(finished / "curves.png") as curves:
        assert curves.width > 1000
    first, second = rows(finished)
    assert list(first)[:4] == ["epoch", "train_loss", "train_lr", "train_wd"]
    ours = {"teacher_entropy", "kl", "loss_over_ln_k", "feature_std", "effective_rank", "momentum"}
    assert ours | {"teacher_temperature", "skipped_steps", "knn", "knn_balanced", "knn_random"} <= set(first)
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert first["skipped_steps"] == 0
    assert first["train_loss"] == pytest.approx(first["loss_over_ln_k"] * np.log(16), rel=1e-5)
    content = load(finished)
    assert content["epoch"] == 2
    assert all(name.startswith(("module.backbone.", "module.head.")) for name in content["student"])


def test_logged_rates_are_means_over_the_epoch(finished):
    warmup, decay = np.linspace(0, 0.1 * 4 / 256, 4), rows(finished)[1]["train_lr"]
    assert rows(finished)[0]["train_lr"] == pytest.approx(warmup.mean())
    assert 1e-6 < decay < warmup[-1]


def test_every_step_moves_student_teacher_and_center(finished):
    begun = Pretraining(tiny(load(finished)["args"]["data_path"], finished.parent / "begun"), CPU)
    fresh, trained = begun.distillation, load(finished)
    for network, name in ((fresh.student, "student"), (fresh.teacher, "teacher")):
        for key, before in network.named_parameters():
            if key != "head.last_layer.weight_g":
                assert not torch.equal(before, trained[name][f"module.{key}"]), key
    assert trained["dino_loss"]["center"].abs().min() > 0


@pytest.mark.parametrize("killed", ["in a step", "between epochs", "looking", "after the log"])
def test_a_killed_run_ends_as_if_nothing_had_happened(
    killed, tmp_path, pictures, finished, monkeypatch, capsys
):
    options = tiny(pictures, tmp_path, save_every_minutes=1e-9)
    if killed in ("in a step", "between epochs"):
        run_until_killed(options, 6 if killed == "in a step" else 4)
    else:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if killed == "looking":
                look = Monitor.look
                patch.setattr(
                    Monitor, "look", lambda *a, epochs: killed_if(epochs) or look(*a, epochs=epochs)
                )
            else:
                patch.setattr(pretraining, "write_curves", lambda *_: killed_if(True))
            pretrain(options)
    pretrain(options)
    assert "resumed:" in capsys.readouterr().out
    assert_same_run(tmp_path, finished)


def killed_if(condition):
    if condition:
        raise Killed


def test_a_finished_run_trains_nothing_and_says_so(tmp_path, pictures, finished, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(SelfDistillation, "step", lambda *_: killed_if(True))
    pretrain(tiny(pictures, folder))
    assert "nothing to train: all epochs are done; a larger --epochs continues" in capsys.readouterr().out
    assert_same_run(folder, finished)


def test_more_epochs_continue_a_finished_run(tmp_path, pictures, finished, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    pretrain(tiny(pictures, folder, epochs=3))
    assert "changed:   --epochs 2 -> 3" in capsys.readouterr().out
    assert load(folder)["epoch"] == 3
    assert rows(folder)[:2] == rows(finished)
    assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]


def test_fewer_epochs_than_are_done_train_nothing(tmp_path, pictures):
    options = tiny(pictures, tmp_path, save_every_minutes=1e-9, knn_freq=0)
    run_until_killed(options, 6)
    pretrain(replace(options, epochs=1))
    assert [row["epoch"] for row in rows(tmp_path)] == [0]


def test_another_number_of_processes_goes_on_with_the_pictures_that_are_left(tmp_path, monkeypatch):
    """A larger batch stands for more processes: both take their part of the same order."""
    folder = write_pictures(tmp_path / "pictures")
    seen = []
    opened = open_pictures(str(folder))
    picture = opened.picture
    opened.picture = lambda index, **size: seen.append(index) or picture(index, **size)
    monkeypatch.setattr(pretraining, "open_pictures", lambda path: opened)
    options = tiny(folder, tmp_path, save_every_minutes=1e-9, epochs=1, knn_freq=0)
    run_until_killed(options, 2)
    del seen[8:]  # of the step that was cut off, and of those prepared ahead
    pretrain(replace(options, batch_size_per_gpu=8))
    assert sorted(seen) == list(range(16))
    assert len(rows(tmp_path)) == 1


def test_a_batch_that_swallows_the_rest_of_an_epoch_still_closes_it(tmp_path, pictures):
    options = tiny(pictures, tmp_path, save_every_minutes=1e-9, knn_freq=0)
    run_until_killed(options, 3)
    pretrain(replace(options, batch_size_per_gpu=12))
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]


def test_looking_changes_nothing_in_the_run(tmp_path, pictures, finished):
    pretrain(tiny(pictures, tmp_path, knn_freq=0))
    found, expected = load(tmp_path), load(finished)
    for part in ("student", "teacher", "optimizer", "dino_loss"):
        assert_same(found[part], expected[part], part)
    assert not (tmp_path / "attention").exists()
    assert not (tmp_path / "best_knn.pth").exists()
    assert all("knn" not in row for row in rows(tmp_path))


def test_recomputed_activations_train_the_same(tmp_path, pictures, finished):
    pretrain(tiny(pictures, tmp_path, knn_freq=0, grad_checkpointing=True))
    found, expected = load(tmp_path), load(finished)
    for network in ("student", "teacher"):
        for name, value in expected[network].items():
            torch.testing.assert_close(found[network][name], value, msg=f"{network} {name}")


@pytest.mark.parametrize(
    "changes",
    [
        {"koleo_weight": 0.1},
        {"centering": "sinkhorn_knopp", "use_bn_in_head": True},
        {"precision": "bf16", "local_crops_number": 0},
        {"precision": "fp16", "optimizer": "lars", "norm_last_layer": False, "epochs": 4},
        {"optimizer": "sgd", "clip_grad": 0.0, "drop_path_rate": 0.0, "save_every_minutes": 0.0},
    ],
    ids=lambda changes: " ".join(map(str, changes)),
)
def test_variants_train_and_resume(changes, tmp_path, pictures):
    options = tiny(pictures, tmp_path / "whole", knn_freq=0, **changes)
    pretrain(options)
    assert np.isfinite(rows(tmp_path / "whole")[-1]["train_loss"])
    assert rows(tmp_path / "whole")[-1]["skipped_steps"] == 0
    options = replace(options, output_dir=str(tmp_path / "killed"), save_every_minutes=1e-9)
    run_until_killed(options, 2)
    pretrain(options)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("arch", "has_sheet"), [("vit_tiny", True), pytest.param("resnet10t", False, marks=pytest.mark.slow)]
)
def test_other_backbones_train(arch, has_sheet, tmp_path, pictures, capsys):
    crops = {"global_crops_size": 32, "local_crops_size": 16}
    pretrain(tiny(pictures, tmp_path, arch=arch, batch_size_per_gpu=16, epochs=1, warmup_epochs=0, **crops))
    assert (tmp_path / "attention" / "epoch_0001.png").exists() == has_sheet
    assert "knn" in rows(tmp_path)[0]
    report = load_backbone_weights(create_backbone(arch), tmp_path / "checkpoint.pth")
    assert not report.missing


def test_labelled_folders_are_judged_by_leaving_one_out(finished, pictures):
    assert rows(finished)[-1]["knn"] == pytest.approx(knn_of(finished, pictures, pictures, exclude_self=True))


def test_a_validation_folder_is_judged_by_the_training_folder(tmp_path, pictures):
    data = tmp_path / "data"
    write_pictures(data / "train", classes=("ants", "cats", "dogs"), count=4)
    write_pictures(data / "val", classes=("cats", "dogs"), count=5, seed=1)  # their labels are not train's
    pretrain(tiny(data, tmp_path / "run", epochs=1))
    expected = knn_of(tmp_path / "run", data / "train", data / "val", exclude_self=False)
    assert rows(tmp_path / "run")[0]["knn"] == pytest.approx(expected)
    assert (tmp_path / "run" / "best_knn.pth").exists()


def knn_of(run, train, test, *, exclude_self):
    """20-NN accuracy of the run's teacher, from its file; a class is its name."""
    backbone = create_backbone("xcit_pico_3_p8")
    load_backbone_weights(backbone, run / "checkpoint.pth")
    names = sorted(folder.name for folder in train.iterdir())
    arrays = []
    for path in (train, test):
        features = extract_features(backbone, open_pictures(str(path)), size=16, progress=None)
        arrays += [features.class_token, np.array([names.index(Path(n).parent.name) for n in features.names])]
    return knn_accuracy(*arrays, ks=(20,), exclude_self=exclude_self)[20].top1


@pytest.mark.parametrize(
    ("classes", "said"),
    [((), "has no classes; k-NN needs a folder for each class"), (("cats", "cows"), "any in train: cows")],
)
def test_k_nn_data_that_does_not_fit_is_refused_at_the_start(classes, said, tmp_path, pictures):
    data = tmp_path / "data"
    shutil.copytree(pictures if classes else pictures / "cats", data / "train")
    write_pictures(data / "val", classes=classes or ("cats",), count=1)
    with pytest.raises(UserError, match=said):
        pretrain(tiny(pictures, tmp_path / "run", knn_data=str(data)))
    assert not list((tmp_path / "run").iterdir())


def test_odd_pictures_without_labels_train_and_a_broken_one_is_named(tmp_path, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    odd = Image.fromarray(noise)
    odd.save(folder / "alpha.png")
    for mode in ("L", "LA", "P", "1", "CMYK"):
        odd.convert(mode).save(folder / f"{mode}.tif")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (600, 3)).save(folder / "stripe.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    pretrain(tiny(folder, tmp_path / "run", batch_size_per_gpu=5, local_crops_size=8))
    out = capsys.readouterr().out
    assert out.count(f"broken picture skipped: {folder / 'broken.png'}: not a picture") == 1
    assert "10, no labels" in out
    assert all("knn" not in row and np.isfinite(row["train_loss"]) for row in rows(tmp_path / "run"))
    assert (tmp_path / "run" / "attention" / "epoch_0002.png").exists()


def test_too_many_broken_pictures_stop_the_run_with_their_list(tmp_path, pictures):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    for index in range(2):
        (folder / "cats" / f"{index}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"broken pictures, --max_broken allows 0") as error:
        pretrain(tiny(folder, tmp_path / "run", max_broken=0, knn_freq=0))
    assert "0.png: empty file" in str(error.value) or "1.png: empty file" in str(error.value)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, pictures, monkeypatch, capsys):
    step, calls = SelfDistillation.step, iter(range(100))

    def poisoned(self, views, rates):
        return step(self, [view * (np.nan if next(calls) == 1 else 1) for view in views], rates)

    monkeypatch.setattr(SelfDistillation, "step", poisoned)
    pretrain(tiny(pictures, tmp_path, epochs=1, knn_freq=0, local_crops_number=0))
    assert capsys.readouterr().out.count("not finite; the step is skipped") == 1
    (row,) = rows(tmp_path)
    assert row["skipped_steps"] == 1
    assert np.isfinite(row["train_loss"])
    assert all(value.isfinite().all() for value in load(tmp_path)["teacher"].values())


def test_finding_a_scale_in_fp16_is_counted_and_is_no_failure(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "_NONFINITE_STEPS_ALLOWED", 2)
    pretrain(tiny(pictures, tmp_path, precision="fp16", epochs=4, knn_freq=0))
    assert sum(row["skipped_steps"] for row in rows(tmp_path)) > 2
    assert "not finite" not in capsys.readouterr().out


def test_ten_steps_that_are_not_finite_save_and_stop_the_run(tmp_path, pictures, monkeypatch, capsys):
    def poisoned(*arguments):
        parts = create(*arguments)
        parts.student.backbone.blocks[1].mlp.fc1.weight.data[0] = np.nan
        return parts

    create = pretraining.create_distillation
    monkeypatch.setattr(pretraining, "create_distillation", poisoned)
    with pytest.raises(RunStopped) as stopped:
        pretrain(tiny(pictures, tmp_path, epochs=5, init_from=""))
    assert "10 steps in a row were not finite, the last is step 9 (learning rate" in str(stopped.value)
    assert "is backbone.blocks.1.mlp.fc1;" in str(stopped.value)
    content = load(tmp_path)
    assert (content["epoch"], content["progress"]["samples"]) == (2, 8)
    assert [(row["train_loss"], row["skipped_steps"]) for row in rows(tmp_path)] == [(None, 4), (None, 4)]


def test_features_that_are_not_finite_do_not_stop_the_run(tmp_path, pictures, monkeypatch, capsys):
    look = Monitor.look

    def poisoned(self, backbone, *, epochs):
        broken = create_backbone("xcit_pico_3_p8")
        broken.norm.weight.data.fill_(np.nan)
        return look(self, broken, epochs=epochs)

    monkeypatch.setattr(Monitor, "look", poisoned)
    pretrain(tiny(pictures, tmp_path))
    assert capsys.readouterr().out.count("no k-NN accuracy: ") == 1
    assert load(tmp_path)["epoch"] == 2


@pytest.mark.parametrize("on_collapse", ["warn", "stop"])
def test_a_collapse_is_named_once(on_collapse, tmp_path, pictures, monkeypatch, capsys):
    def uniform(*arguments):
        parts = create(*arguments)
        for network in (parts.student, parts.teacher):
            network.head.mlp[
                -1
            ].weight.data.zero_()  # the bottleneck is 0 for every picture, and so are the logits
        return parts

    create = pretraining.create_distillation
    monkeypatch.setattr(pretraining, "create_distillation", uniform)
    monkeypatch.setattr(pretraining, "_COLLAPSE_PATIENCE", 2)
    options = tiny(pictures, tmp_path, lr=0.0, min_lr=0.0, knn_freq=0, epochs=3, on_collapse=on_collapse)
    if on_collapse == "stop":
        with pytest.raises(RunStopped, match=r"stopped by --on_collapse stop: output is uniform: .*ln\(16\)"):
            pretrain(options)
        # The warm-up does not count; after it two steps in a row.
        assert load(tmp_path)["progress"]["samples"] == 8
    else:
        pretrain(options)
    assert capsys.readouterr().out.count("COLLAPSE: output is uniform") == 1


def test_init_from_fills_student_and_teacher(tmp_path, pictures, finished):
    torch.manual_seed(5)
    bare = xcit.create_model("xcit_pico_3_p8")
    torch.save(bare.state_dict(), tmp_path / "zoo.pth")
    teacher = {
        name.removeprefix("module.backbone."): value
        for name, value in load(finished)["teacher"].items()
        if "backbone" in name
    }
    for source, expected in (
        (tmp_path / "zoo.pth", bare.state_dict()),
        (finished / "checkpoint.pth", teacher),
    ):
        run = Pretraining(tiny(pictures, tmp_path / "run", init_from=str(source)), CPU)
        for network in (run.distillation.student, run.distillation.teacher):
            assert_same(dict(network.backbone.state_dict()), dict(expected))
        assert run.first_step == 0
        assert run.notes[0].startswith("weights:   ")
        assert "tensors loaded from" in run.notes[0]


def test_init_from_another_architecture_is_refused(tmp_path, pictures):
    torch.save(xcit.create_model("xcit_nano_12_p16").state_dict(), tmp_path / "nano.pth")
    with pytest.raises(UserError, match=r"nano\.pth"):
        pretrain(tiny(pictures, tmp_path / "run", init_from=str(tmp_path / "nano.pth")))


def test_a_checkpoint_of_the_original_resumes(tmp_path, pictures, finished, capsys):
    """Its keys, an optimizer whose step is a plain number, its options as a Namespace, and nothing of ours."""
    content = load(finished)
    groups = [
        {
            **group,
            "lr": np.float64(1e-3),
            "weight_decay": np.float64(0.1),
            "betas": (0.9, 0.999),
            "amsgrad": False,
        }
        for group in content["optimizer"]["param_groups"]
    ]
    state = {
        number: {**moments, "step": int(moments["step"])}
        for number, moments in content["optimizer"]["state"].items()
    }
    original = {
        **{key: content[key] for key in ("student", "teacher", "dino_loss")},
        "optimizer": {"state": state, "param_groups": groups},
        "epoch": 1,
        "args": argparse.Namespace(
            arch="xcit_pico_3_p8", optimizer="adamw", epochs=100, global_crops_scale=[0.4, 1.0]
        ),
        "fp16_scaler": None,
    }
    torch.save(original, tmp_path / "checkpoint.pth")
    run = Pretraining(tiny(pictures, tmp_path), CPU)
    assert run.first_step == 4
    parts = run.distillation
    assert_same(dict(parts.student.state_dict()), {k[7:]: v for k, v in content["student"].items()})
    assert_same(dict(parts.teacher.state_dict()), {k[7:]: v for k, v in content["teacher"].items()})
    assert_same(parts.optimizer.state_dict()["state"], content["optimizer"]["state"])
    assert torch.equal(parts.center.center, content["dino_loss"]["center"])
    pretrain(tiny(pictures, tmp_path))
    assert "changed:   --epochs 100 -> 2" in capsys.readouterr().out
    assert load(tmp_path)["epoch"] == 2


def test_an_older_log_without_a_checkpoint_is_kept_aside(tmp_path, pictures):
    (tmp_path / "log.txt").write_text("notes of somebody else\n")
    pretrain(tiny(pictures, tmp_path, epochs=1, knn_freq=0))
    assert (tmp_path / "log.previous.txt").read_text() == "notes of somebody else\n"
    assert [row["epoch"] for row in rows(tmp_path)] == [0]


def test_a_run_warns_of_nothing_and_writes_lines_where_there_is_no_terminal(
    tmp_path, pictures, capsys, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    monkeypatch.setattr(run_log, "_SECONDS_BETWEEN_LINES", 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(tiny(pictures, tmp_path, epochs=1))
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    assert all(line.startswith("epoch 0: ") and "\r" not in line for line in lines)
    assert lines[-1].startswith("epoch 0: 4/4 steps, 00:00 left, loss ")
    assert lines[-1].endswith(" pictures/s")
    assert any((tmp_path / "tensorboard").iterdir())
