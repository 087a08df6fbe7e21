"""Runs that are stopped, killed, continued, or begun from other weights."""

import argparse
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import xcit
from dino import pretraining
from dino.distillation import SelfDistillation
from dino.monitor import Monitor
from dino.pretraining import Pretraining, pretrain
from dino.resume import check_agreement
from dino.runtime import checkpoint, distributed
from dino.runtime.options import UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import (
    CPU,
    Killed,
    assert_same,
    assert_same_run,
    killed_if,
    load,
    rows,
    run_until_killed,
    tiny,
    write_pictures,
)

pytestmark = pytest.mark.usefixtures("quick")


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
                patch.setattr(pretraining, "draw_curves", lambda *_: killed_if(True))
            pretrain(options)
    pretrain(options)
    assert "resumed:" in capsys.readouterr().out
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize(
    "changes",
    [
        {"koleo_weight": 0.1},
        {"centering": "sinkhorn_knopp", "use_bn_in_head": True},
        {"precision": "bf16", "local_crops_number": 0},
        pytest.param(
            {"precision": "fp16", "optimizer": "lars", "norm_last_layer": False, "epochs": 4},
            marks=pytest.mark.slow,
        ),
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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_loading_processes_change_nothing_in_a_killed_run(tmp_path, pictures, finished, monkeypatch):
    monkeypatch.setattr(distributed, "share_cores", lambda device, num_workers: num_workers)
    options = tiny(pictures, tmp_path, save_every_minutes=1e-9, num_workers=2)
    run_until_killed(options, 5)
    pretrain(options)
    found = load(tmp_path)
    assert found["args"]["num_workers"] == 2
    assert_same(found["teacher"], load(finished)["teacher"])
    assert rows(tmp_path) == rows(finished)


def test_a_kill_among_the_files_of_an_epoch_loses_none_of_them(tmp_path, pictures, finished, monkeypatch):
    save = checkpoint.save_atomically

    def save_and_die(content, path):
        save(content, path)
        killed_if(path.name == "checkpoint0001.pth")

    options = tiny(pictures, tmp_path, saveckp_freq=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save_atomically", save_and_die)
        pretrain(options)
    (tmp_path / "checkpoint0001.pth").unlink()
    pretrain(options)
    assert_same_run(tmp_path, finished)
    for name, epochs in {"checkpoint0000.pth": 1, "checkpoint0001.pth": 2, "checkpoint.pth": 2}.items():
        assert load(tmp_path, name)["epoch"] == epochs
    assert_same(load(tmp_path, "best_knn.pth")["teacher"], load(finished, "best_knn.pth")["teacher"])


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


def test_init_from_does_not_fit_a_folder_that_holds_another_run(tmp_path, pictures, finished):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(
        UserError, match=r"holds a run that did not start from nowhere\.pth: leave out --init_from"
    ):
        pretrain(tiny(pictures, folder, init_from="nowhere.pth"))
    weights = tmp_path / "zoo.pth"
    torch.save(xcit.create_model("xcit_pico_3_p8").state_dict(), weights)
    begun = tiny(pictures, tmp_path / "begun", init_from=str(weights), save_every_minutes=1e-9, knn_freq=0)
    run_until_killed(begun, 2)
    pretrain(begun)  # the same command continues
    assert load(tmp_path / "begun")["epoch"] == 2


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
        "args": argparse.Namespace(arch="xcit", optimizer="adamw", epochs=100, global_crops_scale=[0.4, 1.0]),
        "fp16_scaler": None,
    }
    torch.save(original, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=r"holds a run that did not start from other\.pth"):
        Pretraining(tiny(pictures, tmp_path, init_from="other.pth"), CPU)
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


def test_pictures_that_came_or_went_are_told(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures")
    run_until_killed(tiny(folder, tmp_path / "run", save_every_minutes=1e-9, knn_freq=0), 2)
    (folder / "cats" / "0.png").unlink()
    pretrain(tiny(folder, tmp_path / "run", knn_freq=0))
    said = "pictures:  16 when it was saved, 15 now, so what is left of its epoch comes in another order\n"
    assert said in capsys.readouterr().out
    pretrain(tiny(folder, tmp_path / "run", knn_freq=0, epochs=3))
    assert "when it was saved" not in capsys.readouterr().out


def test_a_resume_with_a_larger_batch_is_no_start(tmp_path, pictures):
    run_until_killed(tiny(pictures, tmp_path, save_every_minutes=1e-9), 2)
    before = load(tmp_path)["progress"]["knn_random"]
    looks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "look", lambda self, backbone, *, epochs: looks.append(epochs) or {"knn": 1.0})
        pretrain(tiny(pictures, tmp_path, batch_size=16))
    assert 0 not in looks
    assert load(tmp_path)["progress"]["knn_random"] == before


def test_fewer_epochs_than_the_one_that_awaits_its_look_leave_it_alone(tmp_path, pictures, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "look", lambda self, backbone, *, epochs: killed_if(epochs == 2))
        patch.setattr(Pretraining, "_look_before", lambda self: None)
        pretrain(tiny(pictures, tmp_path, knn_freq=2))
    pretrain(tiny(pictures, tmp_path, epochs=1))
    assert [row["epoch"] for row in rows(tmp_path)] == [0]


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ([(1, 4), 16, "fp32"], None),
        (
            [(1, 8), 16, "fp32"],
            "the processes found different checkpoints: all machines must see the same --output_dir",
        ),
        (
            [(1, 4), 15, "fp32"],
            "the processes found different numbers of pictures: all must see the same --data_path",
        ),
        ([(1, 4), 16, "bf16"], "the processes would compute in bf16 and fp32: give one with --precision"),
    ],
)
def test_what_processes_do_not_have_in_common_is_refused(theirs, sentence, monkeypatch):
    answers = iter(theirs)
    monkeypatch.setattr(distributed, "gather", lambda items: [*items, next(answers)])
    progress = checkpoint.Progress(epoch=1, samples=4)
    if sentence is None:
        check_agreement(progress, 16, "fp32")
        assert list(answers) == []
        return
    with pytest.raises(UserError) as refusal:
        check_agreement(progress, 16, "fp32")
    assert str(refusal.value) == sentence
