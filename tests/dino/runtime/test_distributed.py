import os
import platform
import threading
import time
from datetime import timedelta

import pytest
import torch

from dino.runtime import distributed
from dino.runtime.distributed import autocast, pick_device, pick_precision, share_cores
from dino.runtime.options import Interrupted, RankFailed, RunStopped, UserError
from tests.two_processes import both_finish

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


@pytest.mark.parametrize(
    ("reason", "code"), [(UserError("wrong"), 2), (RunStopped("collapsed"), 1), (Interrupted("SIGTERM"), 75)]
)
def test_what_ends_all_processes_is_said_by_the_main_one_and_all_exit_alike(reason, code, monkeypatch):
    with pytest.raises(type(reason)) as raised, distributed.processes(CPU):
        raise reason
    assert raised.value is reason
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with pytest.raises(SystemExit) as stop, distributed.processes(CPU):
        raise reason
    assert stop.value.code == code


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Connection closed by peer [127.0.0.1]:33", "lost another process"),
        ("recv: Connection reset by peer", "lost another process"),
        (
            "Timed out waiting 420000ms for recv operation to complete",
            "waited 7 minutes for the others in vain",
        ),
    ],
)
def test_a_process_whose_neighbour_ended_says_that_whichever_it_is(text, sentence, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with (
        pytest.raises(RankFailed, match=f"process 0 of 2 on .* {sentence}"),
        distributed.processes(CPU, timeout=timedelta(minutes=7)),
    ):
        raise RuntimeError(text)


def test_alone_there_is_no_neighbour_to_blame():
    with pytest.raises(RuntimeError, match="reset by peer"), distributed.processes(CPU):
        raise RuntimeError("recv: Connection reset by peer")


def test_what_ends_one_process_is_said_by_it(monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with pytest.raises(RankFailed, match="too little memory"), distributed.processes(CPU):
        raise RankFailed("too little memory")


def test_a_restart_by_torchrun_is_told(monkeypatch):
    assert distributed.restart_note() == []
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert distributed.restart_note() == ["restarted: by torchrun, 2 of at most 3 times"]


def test_deterministic_algorithms_are_asked_for_while_they_are_wanted(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with distributed.deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with distributed.deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


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
    monkeypatch.setattr(distributed, "start", lambda device, dist_url, timeout: calls.append(dist_url))
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
import sys
from datetime import timedelta
import torch
from torch import nn
from dino.memory import step_memory
from dino.head import DinoHead
from dino.network import MultiCropNetwork
from dino.runtime import distributed
from dino.runtime.backbones import create_backbone
from dino.runtime.batch_norm import synchronised
from dino.runtime.options import RankFailed, UserError

cpu = torch.device("cpu")
with distributed.processes(cpu, timeout=timedelta(seconds=30)):
    rank = distributed.rank()
    assert distributed.world_size() == 2 and distributed.is_main() == (rank == 0)
    own = torch.tensor([float(rank), 5.0])
    assert distributed.mean_over_ranks(own).tolist() == [0.5, 5.0] and own.tolist() == [rank, 5.0]
    assert distributed.gather([f"{rank}a", f"{rank}b"]) == ["0a", "0b", "1a", "1b"]
    assert distributed.gather(["only"] * rank) == ["only"] and distributed.gather([]) == []
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    together = distributed.of_all_ranks(rows)
    assert together[:, 0].tolist() == [0, 0, 1, 1]
    together.sum().backward()
    assert torch.equal(rows.grad, torch.ones(2, 3))
    try:
        with distributed.together():
            if rank == 1:
                raise UserError("one cannot go on")
        raise AssertionError("the other went on")
    except UserError as error:
        assert str(error) == "one cannot go on"

    student = MultiCropNetwork(create_backbone("xcit_pico_3_p8"), DinoHead(96, 12, hidden_dim=20, bottleneck_dim=8))
    needed = step_memory(student, [16, 16, 8], 2, low_precision=False)
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda network: synchronised(network, cpu)):
        with_all = convert(student)
        assert abs(step_memory(with_all, [16, 16, 8], 2, low_precision=False) / needed - 1) < 0.1

print("DONE", rank)
"""

_LEFT_ALONE = """
import os, sys, time
from datetime import timedelta
import torch
from dino.runtime import distributed
from dino.runtime.options import RankFailed

try:
    with distributed.processes(torch.device("cpu"), timeout=timedelta(seconds=3)):
        rank = distributed.rank()
        distributed.gather(["both are there"])
        if rank == 1:
            print("DONE 1", flush=True)
            time.sleep(8 if sys.argv[1] == "silent" else 0)
            os._exit(0)
        distributed.gather(["a"])
except RankFailed as reason:
    print("DONE 0", reason)
"""


@pytest.mark.slow
def test_two_processes_share_what_they_find():
    both_finish(_ONE_OF_TWO)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            "silent",
            "waited 0.05 minutes for the others in vain: one of them hangs or needs longer, or the network",
        ),
        ("gone", "lost another process, which has ended; that process, or torchrun, says why"),
    ],
)
def test_who_is_left_alone_says_so_within_the_timeout(other, sentence):
    began = time.monotonic()
    said, _ = both_finish(_LEFT_ALONE, other)
    assert f"DONE 0 process 0 of 2 on {platform.node()} {sentence}" in said
    assert time.monotonic() - began < 60


def test_an_attempt_uses_no_part_of_the_store_that_another_has_used():
    """The other process has died in the first attempt, and is slower than the first one in the second."""
    store = torch.distributed.HashStore()
    parts = {}

    def join(attempt, own, delay):
        time.sleep(delay)
        parts[attempt, own] = distributed.unused_store(store, own, 3, timeout=timedelta(seconds=20))

    for attempt, delays in enumerate([(0, 0.1, 0.2), (0, 0.5, 0.3), (0.4, 0, 0.1)]):
        threads = [
            threading.Thread(target=join, args=(attempt, own, delay)) for own, delay in enumerate(delays)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        parts[attempt, 1].set("address", str(attempt))
        assert all(parts[attempt, own].get("address") == str(attempt).encode() for own in range(3))


def test_who_does_not_come_is_named():
    store = torch.distributed.HashStore()
    with pytest.raises(torch.distributed.DistStoreError, match=r"processes \[1, 2\] did not come"):
        distributed.unused_store(store, 0, 3, timeout=timedelta(seconds=0.2))


def test_a_process_that_cannot_reach_the_others_says_so(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed with Connection refused\nframe #0: somewhere")

    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(
        distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 1, 2)])
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    with pytest.raises(RankFailed) as failure:
        distributed.start(CPU)
    assert str(failure.value) == (
        f"process 1 on {platform.node()} does not reach the others: "
        "Gloo connectFullMesh failed with Connection refused"
    )
