import copy
import errno
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dino.runtime.checkpoint import (
    NAME,
    PREVIOUS_NAME,
    Progress,
    load,
    load_latest,
    pack,
    save_atomically,
    save_latest,
    unpack,
)
from dino.runtime.options import UserError


class Network(nn.Module):
    def __init__(self, width=4, batch_norm=True, prototypes=5):
        super().__init__()
        norm = nn.BatchNorm1d if batch_norm else nn.LayerNorm
        self.backbone = nn.Sequential(nn.Linear(3, width), norm(width), nn.Linear(width, width))
        self.head = nn.Linear(width, prototypes)

    def forward(self, x):
        return self.head(self.backbone(x))


class Parts:
    """Student, teacher, optimizer and center, after some steps."""

    def __init__(self, seed=0, steps=2, **options):
        torch.manual_seed(seed)
        self.student, self.teacher = Network(**options), Network(**options)
        named = list(self.student.named_parameters())
        plain = {name for name, p in named if p.ndim == 1}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for name, p in named if name not in plain]},
                {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
            ],
            lr=0.01,
        )
        self.center = torch.randn(1, options.get("prototypes", 5))
        for step in range(steps):
            self.step(step)

    def step(self, step):
        torch.manual_seed(step)
        self.optimizer.zero_grad()
        self.student(torch.randn(6, 3)).square().sum().backward()
        self.optimizer.step()

    def all(self):
        return self.student, self.teacher, self.optimizer, self.center

    def pack(self, progress=None, **options):
        return pack(*self.all(), progress=progress or Progress(epoch=3), args={"arch": "x"}, **options)


def assert_same_weights(network, other):
    for name, value in other.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def plain_types(value):
    """Types of everything inside."""
    found = {type(value)}
    children = list(value.values()) + list(value) if isinstance(value, Mapping) else []
    children += value if isinstance(value, list | tuple) else []
    return found.union(*(plain_types(child) for child in children))


@pytest.mark.parametrize(("batch_norm", "prefix"), [(True, "module."), (False, "")])
def test_the_layout_is_dinos(batch_norm, prefix):
    content = Parts(batch_norm=batch_norm).pack()
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"} <= set(content)
    assert "fp16_scaler" not in content and content["epoch"] == 3
    names = set(Network(batch_norm=batch_norm).state_dict())
    assert set(content["student"]) == {"module." + name for name in names}
    assert set(content["teacher"]) == {prefix + name for name in names}
    assert set(content["dino_loss"]) == {"center"} and content["dino_loss"]["center"].shape == (1, 5)
    assert [len(group["params"]) for group in content["optimizer"]["param_groups"]] == [3, 5]


def test_a_file_holds_tensors_and_plain_values_only(tmp_path):
    progress = Progress(epoch=1, samples=64, best_knn=np.float64(51.5), totals={"steps": 2.0, "loss": 0.5})
    save_latest(Parts().pack(progress), tmp_path)
    content = torch.load(tmp_path / NAME, weights_only=True)
    assert plain_types(content) <= {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME]


def test_a_resumed_run_goes_on_exactly_as_one_that_never_stopped(tmp_path):
    never_stopped, fresh = Parts(), Parts(seed=1, steps=1)
    progress = Progress(
        epoch=4, samples=96, best_knn=51.5, knn_random=40.25, totals={"steps": 2.0, "loss": 0.5}
    )
    save_latest(never_stopped.pack(progress), tmp_path)
    content, note = load_latest(tmp_path)
    assert note is None and unpack(content, *fresh.all()) == progress
    assert torch.equal(fresh.center, never_stopped.center)
    assert_same_weights(fresh.teacher, never_stopped.teacher)
    for parts in (fresh, never_stopped):
        parts.step(7)
    assert_same_weights(fresh.student, never_stopped.student)


def test_a_checkpoint_of_the_original_resumes_with_each_parameters_own_state(tmp_path):
    theirs, ours = Parts(seed=0, steps=0), Parts(seed=1, steps=1)
    # The original registers its modules in another order: so are its tensors, and so it numbers parameters.
    names = list(theirs.student.state_dict())
    order = [names[index] for index in np.random.default_rng(3).permutation(len(names))]
    parameters = dict(theirs.student.named_parameters())
    shuffled = [(name, parameters[name]) for name in order if name in parameters]
    theirs.optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in shuffled if p.ndim > 1]},
            {"params": [p for _, p in shuffled if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    theirs.step(0)
    theirs.step(1)
    optimizer = copy.deepcopy(theirs.optimizer.state_dict())
    for group in optimizer["param_groups"]:
        group["lr"] = np.float64(group["lr"])
    for moments in optimizer["state"].values():
        moments["step"] = int(moments["step"])  # as torch 1.7 had it
    state = theirs.student.state_dict()
    file = tmp_path / NAME
    torch.save(
        {
            "student": OrderedDict(("module." + name, state[name]) for name in order),
            "teacher": OrderedDict(("module." + k, v) for k, v in theirs.teacher.state_dict().items()),
            "optimizer": optimizer,
            "epoch": 5,
            "args": Namespace(arch="xcit_small_12_p16", lr=np.float64(5e-4)),
            "dino_loss": OrderedDict(center=theirs.center),
            "fp16_scaler": {
                "scale": 1024.0,
                "growth_factor": 2.0,
                "backoff_factor": 0.5,
                "_growth_tracker": 3,
            }
            | {"growth_interval": 2000},
        },
        file,
    )
    scaler = torch.amp.GradScaler("cpu")
    assert unpack(load(file), *ours.all(), scaler) == Progress(epoch=5)
    assert scaler.get_scale() == 1024
    for parts in (theirs, ours):
        parts.step(2)
    for name, value in theirs.student.state_dict().items():
        torch.testing.assert_close(ours.student.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_parameters_that_never_had_a_gradient_have_no_state_to_resume():
    held, ours = Parts(steps=0), Parts(steps=0)
    held.student(torch.randn(6, 3)).sum().backward()
    held.student.head.weight.grad = None
    held.optimizer.step()
    unpack(held.pack(), *ours.all())
    assert ours.student.head.weight not in ours.optimizer.state
    assert len(ours.optimizer.state) == len(list(ours.student.parameters())) - 1


def test_the_scale_of_fp16_is_kept_and_that_of_others_is_not():
    scaler, fresh = torch.amp.GradScaler("cpu", init_scale=64.0), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # it makes its state at first use
    content = Parts().pack(scaler=scaler)
    unpack(content, *Parts().all(), fresh)
    assert fresh.get_scale() == 64
    assert "fp16_scaler" not in Parts().pack(scaler=torch.amp.GradScaler("cpu", enabled=False))
    unpack(Parts().pack(), *Parts().all(), fresh)
    assert fresh.get_scale() == 64


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / NAME
    save_atomically({"step": 1}, file)

    def fill_the_disk(content, stream):
        stream.write(b"PK half of a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(UserError) as refusal:
        save_atomically({"step": 2}, file)
    assert str(refusal.value) == (
        f"cannot write {file}: [Errno 28] No space left on device; what was there before is unchanged"
    )
    monkeypatch.undo()
    assert load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


_REAL_ACCIDENTS = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from dino.runtime.checkpoint import NAME, load, load_latest, save_atomically, save_latest
from dino.runtime.options import UserError

folder = Path(sys.argv[1])
random.seed(0)

def content(step):
    return {"step": step, "weights": torch.full((300_000,), float(step))}

newest = 0
for attempt in range(10):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for step in range(newest + 1, newest + 10**6):
            save_latest(content(step), folder)
            os.write(writer, step.to_bytes(4, "little"))
    os.close(writer)
    last = int.from_bytes(os.read(reader, 4), "little")
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while told := os.read(reader, 4):
        last = int.from_bytes(told, "little")
    found, note = load_latest(folder)
    assert note is None, note
    assert (found["weights"] == found["step"]).all()
    assert found["step"] in (last - 1, last, last + 1), (found["step"], last)
    newest = found["step"]

save_latest(content(newest), folder)  # the last kill may have fallen between the two renames
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
before = load(folder / NAME)["step"]
try:
    save_atomically(content(0), folder / NAME)
except UserError as error:
    print(error)
assert load(folder / NAME)["step"] == before
print(sorted(os.listdir(folder)))
"""


@pytest.mark.slow
def test_kill_9_and_a_write_that_fails_half_way_lose_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _REAL_ACCIDENTS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout and "File too large" in done.stdout
    left = set(eval(done.stdout.splitlines()[-1]))
    # What the killed leave behind has one name each, and is overwritten by the next.
    assert left <= {NAME, PREVIOUS_NAME, f".{NAME}.fresh", f".{NAME}.fresh.tmp", f"..{NAME}.fresh.tmp"}


def two_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        save_latest({"step": step, "weights": torch.zeros(1000)}, folder)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x"]
)
def test_a_damaged_file_falls_back_to_the_one_before_and_says_so(damage, tmp_path):
    two_checkpoints(tmp_path)
    latest = tmp_path / NAME
    latest.write_bytes(damage(latest.read_bytes()))
    content, note = load_latest(tmp_path)
    assert content["step"] == 1
    assert note.startswith(str(latest)) and note.endswith(f"; resuming from {PREVIOUS_NAME}")
    (tmp_path / PREVIOUS_NAME).write_bytes(b"")
    with pytest.raises(UserError, match=f"{NAME}.*{PREVIOUS_NAME}.*; move it away to start anew$"):
        load_latest(tmp_path)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / NAME).rename(tmp_path / f".{NAME}.fresh")
    content, note = load_latest(tmp_path)
    assert content["step"] == 2 and note is None


def test_without_the_last_file_the_one_before_is_resumed_and_said_to_be(tmp_path):
    two_checkpoints(tmp_path)
    (tmp_path / NAME).unlink()
    content, note = load_latest(tmp_path)
    assert content["step"] == 1
    assert note == (
        f"there is no {tmp_path / NAME}; to start anew remove {PREVIOUS_NAME} too; resuming from {PREVIOUS_NAME}"
    )


def test_an_empty_folder_has_nothing_to_resume(tmp_path):
    assert load_latest(tmp_path) == (None, None)
    with pytest.raises(UserError, match=r"^no checkpoint at "):
        load(tmp_path / NAME)


class Innocent:
    pass


def test_a_file_with_code_is_refused(tmp_path):
    torch.save({"args": Innocent()}, tmp_path / NAME)
    with pytest.raises(UserError, match="could run code"):
        load(tmp_path / NAME)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"width": 6},
            r"another architecture: 9 tensors differ, first backbone.0.weight \(file: 6x3, model: 4x3\)",
        ),
        ({"prototypes": 7}, r"2 tensors differ, first head.weight \(file: 7x4, model: 5x4\).*--out_dim"),
        ({"batch_norm": False}, r"first backbone.1.running_mean \(file: absent, model: 4\)"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused_and_nothing_is_changed(options, sentence):
    ours, expected = Parts(), Parts()
    with pytest.raises(UserError, match=sentence):
        unpack(Parts(seed=1, **options).pack(), *ours.all())
    broken = Parts(seed=1).pack()
    broken["teacher"] = Parts(seed=1, **options).pack()["teacher"]
    with pytest.raises(UserError, match="tensors differ"):
        unpack(broken, *ours.all())
    assert_same_weights(ours.student, expected.student)


def test_what_is_missing_or_was_trained_otherwise_is_named():
    content = Parts().pack()
    with pytest.raises(UserError, match=r"^the checkpoint has no optimizer, epoch: use --init_from to start"):
        unpack({k: v for k, v in content.items() if k not in ("optimizer", "epoch")}, *Parts().all())
    with pytest.raises(UserError, match=r"^the checkpoint has 6 prototypes, --out_dim asks for 5$"):
        unpack({**content, "dino_loss": {"center": torch.zeros(1, 6)}}, *Parts().all())
    for name, damaged in {"student": None, "optimizer": [], "epoch": "ten", "dino_loss": 3}.items():
        with pytest.raises(UserError, match=f"^the checkpoint has no {name}: "):
            unpack({**content, name: damaged}, *Parts().all())
    with pytest.raises(UserError, match=r"^the checkpoint has no center: "):
        unpack({**content, "dino_loss": {}}, *Parts().all())
    joined = [{"params": list(range(8))}]
    for optimizer, said in (
        ({}, "no state"),
        ({"state": {}, "param_groups": joined}, "1 groups of parameters"),
    ):
        with pytest.raises(UserError, match=f"^the checkpoint's optimizer has {said}"):
            unpack({**content, "optimizer": optimizer}, *Parts().all())
    frozen = Parts()
    frozen.optimizer = torch.optim.AdamW([{"params": [frozen.student.head.weight]}])
    with pytest.raises(UserError, match="optimizer holds 8 parameters, this run trains 1; --norm_last_layer"):
        unpack(content, *frozen.all())
