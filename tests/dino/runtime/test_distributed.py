import os
import socket
import subprocess
import sys

import pytest
import torch

from dino.runtime import distributed
from dino.runtime.distributed import autocast, pick_device, pick_precision, share_cores
from dino.runtime.options import RunStopped, UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a machine with so many GPUs."""

    def pretend(gpus=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    return pretend


@pytest.mark.parametrize(
    ("gpus", "mps", "name", "device"),
    [
        (0, False, "auto", "cpu"),
        (0, True, "auto", "mps"),
        (2, True, "auto", "cuda:0"),
        (2, False, "cpu", "cpu"),
        (2, False, "cuda", "cuda:0"),
        (2, False, "cuda:1", "cuda:1"),
        (0, True, "mps", "mps"),
    ],
)
def test_the_device_is_the_one_asked_for_or_the_best(gpus, mps, name, device, machine):
    machine(gpus, mps)
    assert pick_device(name) == torch.device(device)


def test_each_process_of_a_machine_takes_its_own_gpu(machine, monkeypatch):
    machine(gpus=4)
    assert pick_device("auto", local_rank=2) == torch.device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("cuda", local_rank=2) == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(
        UserError, match=r"wants GPU 4, and the machine's 4 are numbered .* \(--nproc_per_node\)"
    ):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cuda", "--device cuda: torch sees no CUDA device here; use --device auto or cpu"),
        ("cuda:1", "--device cuda: torch sees no CUDA device here; use --device auto or cpu"),
        ("mps", "--device mps: torch sees no Apple GPU here; use --device auto or cpu"),
        *(
            (name, f"unknown device '{name}'; known: auto, cpu, cuda, mps, cuda:N")
            for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:3", "auto:1")
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, sentence, machine):
    machine()
    with pytest.raises(UserError) as refusal:
        pick_device(name)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("device", "bf16", "precision"),
    [(CUDA, True, "bf16"), (CUDA, False, "fp16"), (CPU, True, "bf16"), (CPU, False, "fp32")],
)
def test_precision_is_bf16_where_the_device_computes_in_it(device, bf16, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": bf16})
    assert pick_precision("auto", device) == precision
    assert pick_precision("fp16", device) == "fp16"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_autocast_computes_in_the_precision(precision):
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with autocast(CPU, precision):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


@pytest.mark.parametrize(
    ("device", "processes", "asked", "workers", "threads"),
    [(CPU, 1, 10, 4, 4), (CPU, 1, 0, 0, 8), (CPU, 4, 10, 1, 1), (CPU, 16, 10, 0, 1), (CUDA, 2, 10, 4, None)],
)
def test_cores_are_shared_between_loading_and_computing(
    device, processes, asked, workers, threads, monkeypatch
):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(distributed, "usable_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert share_cores(device, asked) == workers
    assert given == ([] if threads is None else [threads])


def test_alone_nothing_is_started_and_everything_is_its_own():
    distributed.start(CPU)
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert torch.equal(distributed.mean_over_ranks(torch.arange(3.0)), torch.arange(3.0))
    assert distributed.gather(["a"]) == ["a"] and distributed.gather([]) == []
    with pytest.raises(UserError, match=r"^no$"), distributed.together():
        raise UserError("no")


@pytest.mark.parametrize(("reason", "code"), [(UserError("wrong"), 2), (RunStopped("collapsed"), 1)])
def test_what_ends_all_processes_is_said_by_the_main_one_and_all_exit_alike(reason, code, monkeypatch):
    with pytest.raises(type(reason)) as raised, distributed.processes(CPU):
        raise reason
    assert raised.value is reason
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with pytest.raises(SystemExit) as stop, distributed.processes(CPU):
        raise reason
    assert stop.value.code == code


@pytest.mark.parametrize(
    "text", ["Connection closed by peer [127.0.0.1]:33", "recv: Connection reset by peer"]
)
def test_a_process_whose_neighbour_ended_ends_without_a_word(text):
    with pytest.raises(SystemExit) as stop, distributed.processes(CPU):
        raise RuntimeError(text)
    assert stop.value.code == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ZeroDivisionError(), KeyboardInterrupt()]
)
def test_other_errors_come_through_as_they_are(error, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with pytest.raises(type(error)) as raised, distributed.processes(CPU):
        raise error
    assert raised.value is error


def test_processes_are_left_when_the_work_is_done_and_not_after_an_error(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "start", lambda device, dist_url: calls.append(dist_url))
    monkeypatch.setattr(distributed, "stop", lambda: calls.append("stop"))
    with distributed.processes(CPU, dist_url="tcp://here:1"):
        calls.append("work")
    with pytest.raises(UserError), distributed.processes(CPU):
        raise UserError("wrong")
    assert calls == ["tcp://here:1", "work", "stop", "env://"]


def test_a_device_is_described_in_words(monkeypatch):
    monkeypatch.setattr(distributed, "usable_cores", lambda: 3)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    words = distributed.describe(CPU)
    assert words.startswith("CPU (arm64, ") and words.endswith(", 3 cores)")
    assert distributed.describe(torch.device("mps")) == "Apple GPU (arm64)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H200 number {device.index}")
    assert distributed.describe(torch.device("cuda", 1)) == "H200 number 1"


_ONE_OF_TWO = """
import math, os, sys
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from dino.distillation import Rates, SelfDistillation, teacher_of
from dino.head import DinoHead
from dino.memory import step_memory
from dino.network import MultiCropNetwork
from dino.runtime import distributed
from dino.runtime.backbones import create_backbone
from dino.runtime.options import UserError
from dino.teacher import Center, sinkhorn_knopp

torch.set_num_threads(1)
cpu = torch.device("cpu")
generator = torch.Generator().manual_seed(0)
logits = torch.rand(2, 6, 5, generator=generator) * 2 - 1
views = [[torch.randn(6, 3, 16, 16, generator=generator).double() for _ in range(4)] for _ in range(3)]
rates = Rates(1e-3, 0.1, 0.9, 0.04, False)

def network():
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=0)
    # float64: where a gradient is zero by symmetry, Adam would blow up float32's rounding to full steps.
    return MultiCropNetwork(backbone, DinoHead(24, 12, hidden_dim=20, bottleneck_dim=8)).double()

def train(part, **options):
    torch.manual_seed(0)
    student = network()
    teacher = teacher_of(student, network())
    distillation = SelfDistillation(student, teacher, num_prototypes=12, **options)
    losses = [distillation.step([view[part] for view in step], rates).measures["loss"] for step in views]
    return distillation, torch.tensor(losses)

def compared():
    center = Center(5)
    center.update(logits[:, mine])
    yield "center", center.center
    yield "sinkhorn", sinkhorn_knopp(logits[:, mine], 0.05)
    for name in ("center", "sinkhorn_knopp"):
        distillation, losses = train(mine, centering=name)
        yield name + " losses", losses
        yield name + " center", distillation.center.center
        for network in (distillation.student, distillation.teacher):
            yield name + " weights", nn.utils.parameters_to_vector(network.parameters())

mine = slice(0, 6)
alone = dict(enumerate(compared()))
distributed.start(cpu)
rank = distributed.rank()
assert distributed.world_size() == 2 and distributed.is_main() == (rank == 0)
mine = slice(3 * rank, 3 * rank + 3)
for number, (name, value) in enumerate(compared()):
    expected = alone[number][1]
    if name == "sinkhorn":
        expected = expected[:, mine]
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6, msg=lambda text, name=name: name + ": " + text)

own = torch.tensor([float(rank), 5.0])
assert distributed.mean_over_ranks(own).tolist() == [0.5, 5.0] and own.tolist() == [rank, 5.0]
assert distributed.gather([f"{rank}a", f"{rank}b"]) == ["0a", "0b", "1a", "1b"]
assert distributed.gather(["only"] * rank) == ["only"] and distributed.gather([]) == []
try:
    with distributed.together():
        if rank == 1:
            raise UserError("one cannot go on")
    raise AssertionError("the other went on")
except UserError as error:
    assert str(error) == "one cannot go on"

# What is not finite in one process is skipped in both, and both go on alike.
distillation, _ = train(mine)
before = nn.utils.parameters_to_vector(distillation.student.parameters()).detach().clone()
poisoned = [view[mine].clone() for view in views[0]]
poisoned[1][0] = math.nan if rank == 1 else poisoned[1][0]
assert not distillation.step(poisoned, rates).finite
assert torch.equal(nn.utils.parameters_to_vector(distillation.student.parameters()), before)
assert distillation.step([view[mine] for view in views[1]], rates).finite

student = MultiCropNetwork(create_backbone("xcit_pico_3_p8"), DinoHead(96, 12, hidden_dim=20, bottleneck_dim=8))
needed = step_memory(student, [16, 16, 8], 2, low_precision=False)
synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(student)
assert abs(step_memory(synchronised, [16, 16, 8], 2, low_precision=False) / needed - 1) < 0.1
distributed.stop()
print("DONE", rank)
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_whole_batch():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _ONE_OF_TWO],
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(f"DONE {rank}" in text for rank, text in enumerate(said)), "\n".join(said)
