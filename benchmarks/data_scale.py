"""Does a large set start in seconds, and does memory stay where it is? Folders, tar shards, and many epochs.

python benchmarks/data_scale.py --output benchmarks/results/data_scale.json

Makes a folder of empty files with the names of ImageNet's, and tar shards of pictures of one pixel with a label each.
A fresh process opens each twice, first by a search and then from the index that it left, and lets the workers of a
DataLoader read every name in a shuffled order, several times over; beside it the same with the plain list of
torchvision's ImageFolder. Last, many epochs of a few real files through `dino.loader`. What was just made lies in the
system's memory, so a first start from a cold or a distant disk takes longer; one from the index reads no folder.

Memory is what /proc tells. What is private to a forked worker is what it copied or made since it was forked.
"""

import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino.evaluation.results import provenance
from dino.runtime.files import make_writable, write_atomically
from dino.runtime.options import UserError, command, option

_BATCH = 1000
_MB = 1e6
_KEPT_AFTER = 2.5  # seconds: what changed later than 2 before a search is not trusted to an index
_STAGES = (5, 25, 50)
_SIDE = 64  # of the pictures of the small set, in pixels


@dataclass(frozen=True)
class ScaleOptions:
    names: int = option(1_300_000, "Files of the folder.")
    classes: int = option(1000, "Subfolders that they are in, and classes of the shards.")
    members: int = option(1_000_000, "Files of all shards together: one half pictures, the other labels.")
    shards: int = option(100, "Tar shards.")
    passes: int = option(4, "How often the workers read all names.")
    epochs: int = option(100, "Epochs of the small set.")
    pictures: int = option(128, "Pictures of the small set.")
    workers: int = option(2, "Processes that read.")
    folder: str = option(
        "", "Where to make the files, which go again; empty = the system's temporary folder."
    )
    output: str = option("", "Write the numbers to this JSON file too; empty = no file.")


def measure(options: ScaleOptions) -> None:
    _check(options)
    with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
        root = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        report = {
            "folder": _folder(root / "images", options),
            "shards": _shards(root / "shards", options),
            "epochs": _fresh(_epochs, root / "small", options),
        }
    _show(report)
    if options.output:
        import torch

        from dino.runtime.distributed import describe

        text = (
            json.dumps({**provenance(), "machine": describe(torch.device("cpu")), **report}, indent=1) + "\n"
        )
        write_atomically(Path(options.output), lambda temporary: temporary.write_text(text))


def _check(options: ScaleOptions) -> None:
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("memory is read from /proc/self/smaps_rollup, which is not here: run it on Linux")
    counts = (options.shards, options.passes, options.epochs, options.pictures, options.workers)
    if min(counts) < 1:
        raise UserError(
            f"--shards, --passes, --epochs, --pictures and --workers must be 1 or more, got {counts}"
        )
    least = 2 * options.classes
    if options.classes < 2 or min(options.names, options.members) < least:
        raise UserError(
            f"--classes must be 2 or more, and --names and --members twice as many ({least}) or more, got "
            f"{options.classes}, {options.names} and {options.members}"
        )
    if options.output:
        make_writable(Path(options.output).parent, "--output")
    if options.folder:
        make_writable(Path(options.folder), "--folder")


def _fresh(work: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, not forked, so that its memory is what the work takes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _fork_workers) as process:
        return process.submit(work, *arguments).result()


def _fork_workers() -> None:
    multiprocessing.set_start_method("fork", force=True)  # else a spawned process spawns too


def _folder(root: Path, options: ScaleOptions) -> dict[str, Any]:
    made = _seconds(lambda: _make_folder(root, options))
    time.sleep(_KEPT_AFTER)
    first = _fresh(_first_start, root)
    listed = _fresh(_read_names, root, options, True)
    return {
        "names": options.names,
        "classes": options.classes,
        "made_seconds": made,
        "first_start": first,
        "index_mb": sum(file.stat().st_size for file in _indexes()) / _MB,
        "from_index": _fresh(_read_names, root, options, False),
        "torchvision_list": listed,
    }


def _shards(root: Path, options: ScaleOptions) -> dict[str, Any]:
    before = _indexes()
    made = _seconds(lambda: _make_shards(root, options))
    time.sleep(_KEPT_AFTER)
    first = _fresh(_first_start, root)
    return {
        "members": options.members,
        "pictures": options.members // 2,
        "shards": options.shards,
        "made_seconds": made,
        "first_start": first,
        "index_mb": sum(file.stat().st_size for file in _indexes() - before) / _MB,
        "from_index": _fresh(_read_names, root, options, False),
    }


def _make_folder(root: Path, options: ScaleOptions) -> None:
    for number in range(options.classes):
        synset = f"n{number:08d}"
        (root / synset).mkdir(parents=True)
        for index in range(number, options.names, options.classes):
            os.close(os.open(root / synset / f"{synset}_{index}.JPEG", os.O_CREAT | os.O_WRONLY))


def _make_shards(root: Path, options: ScaleOptions) -> None:
    root.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "PNG")
    content = stream.getvalue()
    for number in range(options.shards):
        with tarfile.open(root / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(number, options.members // 2, options.shards):
                label = f"{index % options.classes}".encode()
                for suffix, part in (("png", content), ("cls", label)):
                    header = tarfile.TarInfo(f"{index:012d}.{suffix}")
                    header.size = len(part)
                    tar.addfile(header, io.BytesIO(part))
                tar.members = []  # type: ignore[attr-defined]


def _indexes() -> set[Path]:
    return set(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz"))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory(pid: int | str = "self") -> dict[str, float]:
    """Megabytes of a process: those resident, and of these what no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return {"resident": kilobytes["Rss"] * 1024 / _MB, "private": private * 1024 / _MB}


def _memory_of_all() -> dict[str, float]:
    """Of this process, and of its workers on average."""
    workers = [_memory(child.pid) for child in multiprocessing.active_children() if child.pid]
    return {
        "main_resident_mb": _memory()["resident"],
        "worker_resident_mb": sum(worker["resident"] for worker in workers) / len(workers),
        "worker_private_mb": sum(worker["private"] for worker in workers) / len(workers),
    }


def _load_libraries() -> None:
    from dino.runtime import picture_files, tar_shards  # noqa: F401
    from dino.runtime.images import suffixes

    suffixes()


def _start(root: Path, like_torchvision: bool = False) -> tuple[Any, dict[str, float]]:
    """The set, the seconds until it is known, and the megabytes that it adds to this process."""
    _load_libraries()
    if like_torchvision:
        from torchvision.datasets import ImageFolder

    from dino.runtime.pictures import open_pictures

    before, start, busy = _memory()["private"], time.perf_counter(), time.process_time()
    opened = ImageFolder(root) if like_torchvision else open_pictures(str(root))
    return opened, {
        "start_seconds": time.perf_counter() - start,
        "start_processor_seconds": time.process_time() - busy,
        "added_mb": _memory()["private"] - before,
    }


def _first_start(root: Path) -> dict[str, float]:
    return _start(root)[1]


def _read_names(root: Path, options: ScaleOptions, like_torchvision: bool) -> dict[str, Any]:
    """A start, and memory after each pass of the workers over all names."""
    from torch.utils.data import DataLoader

    opened, report = _start(root, like_torchvision)
    loader: DataLoader[int] = DataLoader(
        _Lengths(opened, like_torchvision),
        batch_sampler=_Shuffled(len(opened)),
        num_workers=options.workers,
        collate_fn=sum,
        persistent_workers=True,
    )
    passes, seconds = [], []
    for _ in range(options.passes):
        start = time.perf_counter()
        characters = sum(loader)
        seconds.append(time.perf_counter() - start)
        passes.append(_memory_of_all())
    return {**report, "characters": characters, "pass_seconds": seconds, "after_pass": passes}


class _Lengths:
    """Lengths of names instead of pictures: what reading a name alone does to memory."""

    def __init__(self, opened: Any, like_torchvision: bool) -> None:
        self.opened = opened
        self.like_torchvision = like_torchvision

    def __getitem__(self, index: int) -> int:
        return len(self.opened.samples[index][0] if self.like_torchvision else self.opened.name(index))


class _Shuffled:
    """Batches of places, in another order on every pass."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.passes = 0

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(self.passes).permutation(self.count)
        self.passes += 1
        for start in range(0, self.count, _BATCH):
            yield order[start : start + _BATCH].tolist()


def _epochs(root: Path, options: ScaleOptions) -> dict[str, Any]:
    """Memory over the epochs of one long loop, as training runs it."""
    from dino.loader import EpochOrder, create_loader
    from dino.runtime.pictures import open_pictures

    root.mkdir()
    generator = np.random.default_rng(0)
    for index in range(options.pictures):
        pixels = generator.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    batch_size = min(16, options.pictures)
    per_epoch = options.pictures // batch_size
    order = EpochOrder(options.pictures, global_batch=batch_size, epochs=options.epochs, seed=0)
    pictures = open_pictures(str(root))
    loader = create_loader(pictures, _as_view, order, num_workers=options.workers, pin_memory=False)
    stages = {*_STAGES, options.epochs}
    after = {}
    for step, batch in enumerate(loader, 1):
        assert len(batch.views[0]) == batch_size
        if step % per_epoch == 0 and step // per_epoch in stages:
            # The workers are ahead by a few batches, the same number each time but the last.
            after[str(step // per_epoch)] = _memory_of_all()
    return {"pictures": options.pictures, "epochs": options.epochs, "after_epoch": after}


def _as_view(picture: Image.Image) -> Any:
    import torch

    from dino.multicrop import Views

    return Views([torch.from_numpy(np.array(picture))])


def _show(report: dict[str, Any]) -> None:
    folder, shards = report["folder"], report["shards"]
    print(
        f"{folder['names']:,} files in {folder['classes']:,} folders; {shards['pictures']:,} pictures in shards"
    )
    print(
        f"{'':28}{'start':>9}{'processor':>11}{'adds':>10}   private to a worker after each pass over the names"
    )
    rows = {
        "torchvision's ImageFolder": folder["torchvision_list"],
        "folder, first start": folder["first_start"],
        "folder, from the index": folder["from_index"],
        "shards, first start": shards["first_start"],
        "shards, from the index": shards["from_index"],
    }
    for name, row in rows.items():
        passes = "".join(f"{stage['worker_private_mb']:8.1f}" for stage in row.get("after_pass", ()))
        unit = " MB" if passes else ""
        start, busy = row["start_seconds"], row["start_processor_seconds"]
        print(f"{name:28}{start:7.1f} s{busy:9.1f} s{row['added_mb']:7.1f} MB{passes}{unit}")
    print(f"{report['epochs']['pictures']} pictures: memory after epoch")
    for epoch, stage in report["epochs"]["after_epoch"].items():
        sizes = [stage[f"{size}_mb"] for size in ("main_resident", "worker_resident", "worker_private")]
        print("{:>6}  main {:.1f} MB, worker {:.1f} MB, private to it {:.1f} MB".format(epoch, *sizes))


if __name__ == "__main__":
    command(ScaleOptions, measure, prog="benchmarks/data_scale.py", description=__doc__ or "")
