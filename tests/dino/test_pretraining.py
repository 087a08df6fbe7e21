"""Whole runs of a tiny network on a few pictures: what they write, and what stops them."""

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino import pretraining
from dino.distillation import SelfDistillation
from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.knn import knn_accuracy
from dino.monitor import Monitor
from dino.pretraining import Pretraining, pretrain
from dino.runtime import distributed, run_log
from dino.runtime.backbones import create_backbone, load_backbone_weights
from dino.runtime.options import RunStopped, UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import CPU, assert_same, load, rows, tiny, write_pictures

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_writes_checkpoints_log_curves_and_attention_sheets(finished):
    written = {str(path.relative_to(finished)) for path in finished.rglob("*.p*")}
    assert written == {
        "checkpoint.pth",
        "checkpoint.previous.pth",
        "best_knn.pth",
        "curves.png",
        *(f"attention/epoch_000{epochs}.png" for epochs in range(3)),
    }
    page = (finished / "index.html").read_text()
    assert all(name in page for name in written if name.endswith(".png")), "the page shows all of them"
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


def test_the_first_lines_say_what_the_run_understood_and_the_last_what_came_out(tmp_path, pictures, capsys):
    pretrain(tiny(pictures, tmp_path, batch_size_per_gpu=8, lr=0.32))
    out = capsys.readouterr().out
    assert f"pictures:  16, in 2 classes, from {pictures}\n" in out
    assert "backbone:  xcit_pico_3_p8, 0.6 M parameters; 16 prototypes\n" in out
    assert "views:     2 x 16 px, 1 x 16 px\n" in out
    assert "steps:     2 epochs x 2 steps = 4 steps, of 8 pictures\n" in out
    assert "rates:     learning rate 0.32 x 8 / 256 = 0.01 at its peak\n" in out
    assert re.search(r"computing: cpu, fp32, about 0\.\d+ GiB of memory for a step of a process\n", out)
    before, after = (rows(tmp_path)[-1][name] for name in ("knn_random", "knn"))
    closing = f"20-NN accuracy: {before:.1f} % for the random network, {after:.1f} % after the training\n"
    assert out.endswith(
        f"{closing}checkpoint.pth, best_knn.pth, log.txt, attention: in {tmp_path.resolve()}\n"
        f"open {tmp_path / 'index.html'}: curves, k-NN, and attention as it emerged\n"
    )


def test_files_are_kept_and_looks_taken_as_often_as_asked(tmp_path, pictures):
    pretrain(tiny(pictures, tmp_path, epochs=5, saveckp_freq=2, knn_freq=2))
    assert sorted(path.name for path in tmp_path.glob("checkpoint0*")) == [
        f"checkpoint000{epoch}.pth" for epoch in (0, 2, 4)
    ]
    assert [load(tmp_path, f"checkpoint000{epoch}.pth")["epoch"] for epoch in (0, 2, 4)] == [1, 3, 5]
    assert ["knn" in row for row in rows(tmp_path)] == [False, True, False, True, True]
    sheets = sorted(path.name for path in (tmp_path / "attention").iterdir())
    assert sheets == [f"epoch_000{epochs}.png" for epochs in (0, 2, 4, 5)]


def test_the_best_network_is_kept(tmp_path, pictures, monkeypatch):
    accuracies = {0: 99.0, 1: 40.0, 2: 60.0, 3: 60.0, 4: 50.0}  # the random network's is no candidate
    monkeypatch.setattr(Monitor, "look", lambda self, backbone, *, epochs: {"knn": accuracies[epochs]})
    pretrain(tiny(pictures, tmp_path, epochs=4))
    best = load(tmp_path, "best_knn.pth")
    assert (best["epoch"], best["progress"]["best_knn"]) == (2, 60.0)
    assert load(tmp_path)["progress"]["best_knn"] == 60.0


def test_k_nn_is_judged_on_the_pictures_and_at_the_size_asked_for(tmp_path, pictures):
    data = tmp_path / "data"
    write_pictures(data / "train", count=30, seed=2)
    write_pictures(data / "val", count=20, seed=3)
    pretrain(tiny(pictures, tmp_path / "run", epochs=1, knn_data=str(data), eval_size=24))
    expected = knn_of(tmp_path / "run", data / "train", data / "val", exclude_self=False, size=24)
    assert rows(tmp_path / "run")[0]["knn"] == pytest.approx(expected)


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


def knn_of(run, train, test, *, exclude_self, size=16):
    """20-NN accuracy of the run's teacher, from its file; a class is its name."""
    backbone = create_backbone("xcit_pico_3_p8")
    load_backbone_weights(backbone, run / "checkpoint.pth")
    names = sorted(folder.name for folder in train.iterdir())
    arrays = []
    for path in (train, test):
        extractor = Extractor(backbone, Preparation(size=size))
        features = extractor.extract(open_pictures(str(path)), progress=None)
        arrays += [features["cls"], np.array([names.index(Path(n).parent.name) for n in features.names])]
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
