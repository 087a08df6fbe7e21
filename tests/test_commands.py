"""The commands in processes of their own, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest
import torch

from dino.pretraining import pretrain
from dino.runtime import checkpoint, distributed
from dino.train_options import TrainOptions
from tests.dino.small_runs import TINY, rows, write_pictures

ONE_EPOCH = {
    **TINY,
    "epochs": 1,
    "warmup_epochs": 0,
    "knn_freq": 1,
}
WEIGHTS = ("--arch=xcit_pico_3_p8", "--device=cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """train/ and val/, two classes of different colours."""
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", count=24)
    write_pictures(root / "val", count=4, seed=1)
    return root


def flags(**options):
    return [f"--{name}={value}" for name, value in options.items()]


def start(*arguments, **settings):
    """A Python process that computes in one thread, as if every core had a process."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())},
        **settings,
    )


def run(*arguments, code=0, **settings):
    """Standard output and error of a command that ends with the exit code."""
    process = start(*arguments, **settings)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights_and_all_commands_read_them(pictures, tmp_path, monkeypatch):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    train = ("-m", "dino.train", *flags(**ONE_EPOCH, data_path=pictures, save_every_minutes=1e-9))
    process = start(*train, *flags(output_dir=killed))
    while not (killed / checkpoint.PREVIOUS_NAME).exists():  # the second step is saved
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < checkpoint.load_latest(killed)[0]["progress"]["samples"] < 48

    out, err = run(*train, *flags(output_dir=killed))
    assert "resumed:" in out
    assert err == ""
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    pretrain(TrainOptions(**ONE_EPOCH, data_path=str(pictures), output_dir=str(whole)))
    found, expected = (checkpoint.load(folder / checkpoint.NAME) for folder in (killed, whole))
    for network in ("student", "teacher"):
        for name, value in expected[network].items():
            assert torch.equal(found[network][name], value), name
    assert rows(killed) == rows(whole)

    weights = (*WEIGHTS, f"--pretrained_weights={killed / checkpoint.NAME}")
    sets = flags(data_path=pictures, image_size=16, num_workers=0)
    looked_at = (
        "--input",
        str(pictures / "val" / "cats" / "0.png"),
        "demo",
        f"--output_dir={tmp_path / 'maps'}",
    )
    commands = {
        "dino.evaluation.eval_knn": [*weights, *sets, "--nb_knn", "20"],
        "dino.evaluation.eval_linear": [*weights, *sets],
        "dino.attention.visualize": [*weights, *looked_at],
        "dino.downstream.classify": [
            *(
                "--preset=small",
                f"--weights={killed / checkpoint.NAME}",
                f"--data_path={pictures}",
                "--device=cpu",
            ),
            *flags(
                input_size=16,
                epochs=1,
                warmup_epochs=0,
                batch_size=8,
                num_workers=0,
                output_dir=tmp_path / "classes",
            ),
        ],
    }
    out, _ = run("-c", IN_TURN, json.dumps(commands), cwd=tmp_path)
    assert f"20-NN classifier result: Top1: {rows(whole)[0]['knn']}," in out
    assert "CLS + patch mean" in out
    assert "with a fresh head" in out and "Max accuracy: " in out
    assert (tmp_path / "classes" / "best_model.pth").exists()
    for name in ("0/attn-head3.png", "star-rings/sheet.png", "clip/video.mp4", "index.html"):
        assert (tmp_path / "maps" / name).exists(), name


# `python -m` of each, in one process, since most of their time goes into importing torch.
IN_TURN = """
import json, runpy, sys
for module, arguments in json.loads(sys.argv[1]).items():
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

AGREE = """
import os, torch
from dino.pretraining import Pretraining
from dino.train import main

def run_and_tell(self):
    run(self)
    parts = self.distillation
    told = [*parts.student.parameters(), *parts.teacher.parameters(), parts.center.center]
    torch.save([value.detach() for value in told], f"rank{os.environ['RANK']}.pth")

run, Pretraining.run = Pretraining.run, run_and_tell
main()
"""


@pytest.mark.slow
def test_two_processes_train_one_network(pictures, tmp_path):
    (tmp_path / "agree.py").write_text(AGREE)
    options = flags(
        **{**ONE_EPOCH, "batch_size_per_gpu": 12, "epochs": 2}, data_path=pictures, output_dir=tmp_path
    )
    out, err = run(*TORCHRUN, "agree.py", *options, cwd=tmp_path)
    assert "2 epochs x 2 steps = 4 steps, of 24 pictures (2 processes x 12)" in out
    assert out.count("pictures:") == 1
    assert "Warning" not in err
    assert [row["epoch"] for row in rows(tmp_path)] == [0, 1]
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_all_with_one_sentence(pictures, tmp_path):
    """Only the main process opens the pictures for k-NN."""
    options = flags(**ONE_EPOCH, data_path=pictures, output_dir=tmp_path, knn_data="/nowhere")
    began = time.monotonic()
    _, err = run(*TORCHRUN, "-m", "dino.train", *options, code=1)  # torchrun's own
    assert time.monotonic() - began < 120
    said = [line for line in err.splitlines() if line.startswith("python -m dino.train: ")]
    assert said == [
        "python -m dino.train: /nowhere is no file or folder, nor demo, nor a data set of torchvision"
    ]
    assert "exitcode  : 2" in err or "exitcode: 2" in err
    assert "UserError" not in err


DEMO = """
import socket, sys
def refuse(*_, **__): raise AssertionError("the demo asked for the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from dino.train import main
main()
"""


@pytest.mark.slow
def test_the_demo_needs_no_network_and_leaves_what_it_promises(tmp_path):
    shorter = flags(epochs=1, warmup_epochs=1, batch_size_per_gpu=500, knn_max_pictures=200)
    smaller = flags(global_crops_size=24, local_crops_size=16, local_crops_number=1, eval_size=32)
    out, _ = run(
        "-c", DEMO, "--preset", "tiny", "--data_path", "demo", *flags(output_dir=tmp_path), *shorter, *smaller
    )
    assert "20-NN accuracy: " in out and " % for the random network, " in out
    assert len(rows(tmp_path)) == 1
    for name in ("checkpoint.pth", "curves.png", "attention/epoch_0000.png", "attention/epoch_0001.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_console_commands_are_installed():
    commands = {"dino-train", "dino-features", "dino-knn", "dino-linear", "dino-verify"}
    commands |= {"dino-attention", "dino-attention-score", "dino-slurm"}
    commands |= {"dino-classify", "dino-detect", "dino-segment"}
    found = {entry.name: entry for entry in entry_points(group="console_scripts") if entry.name in commands}
    assert found.keys() == commands
    assert all(callable(entry.load()) for entry in found.values())
