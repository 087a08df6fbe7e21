import copy
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from dino.runtime.checkpoint import NAME, Progress, load, load_latest, pack, save_latest, unpack
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
