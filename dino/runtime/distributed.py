"""Processes, devices and precision: the same command alone or under torchrun, on CUDA, MPS or CPU."""

import os
import platform
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dino.runtime.options import Interrupted, RankFailed, RunStopped, UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

Item = TypeVar("Item")

# Long enough for a disk to be searched, or weights to be downloaded, by another one; torchrun ends all at once when one
# dies.
_TIMEOUT = timedelta(hours=3)
# What gloo says when a process at the other end is gone, and when it does not answer.
_GONE = re.compile("closed by peer|reset by peer|broken pipe", re.IGNORECASE)
_SILENT = re.compile("timed out|timeout", re.IGNORECASE)

_BETWEEN_LOOKS = 0.02  # seconds

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def start(device: torch.device, *, dist_url: str = "env://", timeout: timedelta = _TIMEOUT) -> None:
    """Join the other processes when torchrun started several; alone, do nothing.

    Args:
        timeout: how long a process waits for the others before it gives them up; see `wait_at_most`.

    Raises:
        UserError: the environment says that there are others, but not which of them this one is.
        RankFailed: they cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if "RANK" not in os.environ:
        raise UserError(
            "WORLD_SIZE is set and RANK is not: start several processes with torchrun, or unset it"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = next(rendezvous(dist_url, own, count, timeout=timeout))[0]
        store.set_timeout(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = unused_store(store, own, count, timeout=timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=timeout)
    except RuntimeError as error:  # DistError of the store, and gloo's own
        reason = str(error).partition("\n")[0]
        raise RankFailed(
            f"process {os.environ['RANK']} on {platform.node()} does not reach the others: {reason}"
        ) from error


def unused_store(store: Store, own: int, count: int, *, timeout: timedelta) -> Store:
    """The part of a store that no earlier attempt of these processes has written to.

    torchrun keeps one store through all restarts, in which a process that is faster than the others finds the address
    of one that has died, and calls it in vain. So the first process numbers the attempt and tells each other one the
    number, until that one has confirmed it: what an earlier one asked may still be there, but confirms nothing.

    Raises:
        DistError: the others do not come.
    """
    if own:
        question = uuid.uuid4().hex
        store.set(f"asks/{own}", question)
        attempt = store.get(f"answer/{question}").decode()
        store.set(f"confirmed/{attempt}/{own}", "")
        return PrefixStore(f"attempt/{attempt}", store)
    attempt = str(store.add("attempts", 1))
    missing = set(range(1, count))
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"confirmed/{attempt}/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", attempt)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"processes {sorted(missing)} did not come")
        time.sleep(_BETWEEN_LOOKS)
    return PrefixStore(f"attempt/{attempt}", store)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def processes(
    device: torch.device, *, dist_url: str = "env://", timeout: timedelta = _TIMEOUT
) -> Iterator[None]:
    """Work of all processes that torchrun started, or of this one alone; what ends it is said by one of them.

    Raises:
        UserError, RunStopped: as raised inside, in the main process; the others exit with the same code.
        RankFailed: what happened to this process only, or that another one is gone, or silent for the timeout.
    """
    start(device, dist_url=dist_url, timeout=timeout)
    try:
        yield
    except (UserError, RunStopped) as reason:
        says_it = is_main() or isinstance(reason, RankFailed)
        if dist.is_initialized() and dist.get_backend() == "gloo":
            # Or its threads, whose peers are going too, may abort the process on its way out. NCCL would wait for
            # peers that may never come.
            stop()
        if says_it:
            raise
        # All processes share what is raised here, and one says it.
        raise SystemExit(reason.exit_code) from None
    except RuntimeError as error:
        if world_size() == 1:
            raise
        failure = _of_another(str(error))
        if failure is None:
            raise
        raise RankFailed(f"{this_process()} {failure}") from error
    # Not after an error: others may wait in a reduction, and this would wait for them.
    stop()


def wait_at_most(timeout: timedelta) -> None:
    """From now on, give up other processes that do not answer for so long."""
    if dist.is_initialized():
        # Its public name is newer than the oldest torch that is supported.
        set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        set_timeout(timeout, dist.group.WORLD)


def _of_another(message: str) -> str | None:
    """What a failed reduction tells of the other processes, if that is what failed."""
    if _GONE.search(message):
        return "lost another process, which has ended; that process, or torchrun, says why"
    if _SILENT.search(message):
        waited = re.search(r"(\d+) ?ms", message)
        minutes = f"{int(waited[1]) / 60_000:g} minutes " if waited else ""
        return (
            f"waited {minutes}for the others in vain: one of them hangs or "
            "needs longer, or the network between them is cut"
        )
    return None


def this_process() -> str:
    """Its number, from 0, and its machine, in words."""
    if world_size() == 1:
        return "this process"
    return f"process {rank()} of {world_size()} on {platform.node()}"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a float tensor over all processes, which is left as it is."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()


def of_all_ranks(rows_BC: Tensor) -> Tensor:
    """The rows of all processes, as many of each, in the order of the ranks; gradients reach this one's own."""
    if world_size() == 1:
        return rows_BC
    of_rank = [torch.empty_like(rows_BC) for _ in range(world_size())]
    dist.all_gather(of_rank, rows_BC.detach().contiguous())
    of_rank[rank()] = rows_BC
    return torch.cat(of_rank)


def gather(items: Sequence[Item]) -> list[Item]:
    """The items of all processes, in the order of the ranks; costs one number where there are none."""
    if world_size() == 1:
        return list(items)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if not mean_over_ranks(torch.tensor(float(len(items)), device=device)):
        return []
    of_rank: list[Any] = [None] * world_size()
    dist.all_gather_object(of_rank, list(items))
    return [item for some in of_rank for item in some]


def restart_note() -> list[str]:
    """A line when torchrun has started the processes again, after one of them died."""
    count, most = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS")
    )
    return [f"restarted: by torchrun, {count} of at most {most} times"] if count else []


@contextmanager
def together() -> Iterator[None]:
    """What stops any process in here stops all, for the same reason; nothing in here may wait for a reduction."""
    problems: list[UserError | Interrupted] = []
    try:
        yield
    except (UserError, Interrupted) as error:
        problems.append(error)
    for problem in gather(problems):
        raise problem from None


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` takes CUDA, then MPS, then CPU; CUDA processes take the GPU of their local rank.

    Raises:
        UserError: a device that this machine, or this build of torch, does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if (
        kind not in DEVICES
        or (kind == "auto")
        or (":" in name and (kind != "cuda" or not number.isdecimal()))
    ):
        raise UserError(f"unknown device '{name}'; known: {', '.join(DEVICES)}, cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device auto or cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use --device auto or cpu")
    if kind != "cuda":
        return torch.device(kind)
    index = int(number or os.environ.get("LOCAL_RANK", str(local_rank)))
    if index >= torch.cuda.device_count():
        raise UserError(
            f"this process wants GPU {index}, and the machine's {torch.cuda.device_count()} are numbered from 0; "
            "start at most one process per GPU (--nproc_per_node)"
        )
    return torch.device("cuda", index)


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` takes bf16 where the device computes in it, else fp16 on CUDA, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # newer than the oldest torch that is supported
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Mixed precision for the forward pass; fp32 changes nothing."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Algorithms that give the same bits every time, also on GPUs, where the fast ones may not."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def describe(device: torch.device) -> str:
    """The device in words, for results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU ({platform.machine()})"
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {usable_cores()} cores)"


def share_cores(device: torch.device, num_workers: int) -> int:
    """Loading processes that this process may start; on a CPU the network then computes on the other cores.

    More busy threads than cores make each other wait many times longer than the work takes.
    """
    cores = max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if device.type != "cpu":
        return min(num_workers, cores)
    workers = min(num_workers, cores // 2)
    torch.set_num_threads(cores - workers)
    return workers


def take_all_cores() -> None:
    """Loading is over, and this process goes on alone."""
    torch.set_num_threads(usable_cores())


def usable_cores() -> int:
    """Cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
