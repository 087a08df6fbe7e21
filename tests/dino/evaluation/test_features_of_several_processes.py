"""Several processes make the same files as one, and end together."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.feature_cache import Origin, cached_features
from dino.runtime.backbones import create_backbone, tensors_sha256
from dino.runtime.fingerprint import fingerprint
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import write_pictures

_ONE_OF_SEVERAL = """
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.feature_cache import Origin, cached_features
from dino.runtime import distributed
from dino.runtime.backbones import create_backbone, tensors_sha256
from dino.runtime.fingerprint import fingerprint
from dino.runtime.options import command
from dino.runtime.pictures import open_pictures

torch.set_num_threads(1)

@dataclass(frozen=True)
class Options:
    pass

def run(options):
    photos, folder = sys.stdin.read().split()
    torch.manual_seed(0)
    extractor = Extractor(create_backbone("xcit_pico_3_p8"), Preparation(size=16), batch_size=2)
    origin = Origin("xcit_pico_3_p8", tensors_sha256(extractor.backbone), "random", None)
    with distributed.processes(extractor.device):
        def features(name):
            pictures = open_pictures(photos)
            return cached_features(
                Path(folder), name, extractor, pictures, ("cls", "patch_mean"),
                origin=origin, data=fingerprint(pictures), say=lambda line: print(line, flush=True),
            )
        made, reused = features("whole"), features("whole")
        assert made["cls"].tobytes() == reused["cls"].tobytes() and made.names == reused.names
        print(len(made.names), made.labels.tolist(), made.broken, flush=True)
        if distributed.rank() == distributed.world_size() - 1:
            extractor.backbone.norm.weight.data.fill_(torch.nan)
        features("mistake")
        raise AssertionError("a process went on")

command(Options, run, prog="features", description="")
"""


def run_together(count, photos, folder):
    """What each process printed, and its exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _ONE_OF_SEVERAL],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        for process in processes:
            process.stdin.write(f"{photos}\n{folder}\n")
            process.stdin.close()
            process.stdin = None
        said = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return said, [process.returncode for process in processes]


def made_by_one(photos, folder):
    torch.manual_seed(0)
    extractor = Extractor(create_backbone("xcit_pico_3_p8"), Preparation(size=16), batch_size=2)
    origin = Origin("xcit_pico_3_p8", tensors_sha256(extractor.backbone), "random", None)
    pictures = open_pictures(str(photos))
    data = fingerprint(pictures)
    cached_features(
        folder, "whole", extractor, pictures, ("cls", "patch_mean"), origin=origin, data=data, say=print
    )


def contents(folder):
    """Every file but the record, and the record without its date."""
    (place,) = (path for path in folder.iterdir() if path.name.startswith("whole-"))
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    record = json.loads(files.pop("features.json"))
    return files, {name: value for name, value in record.items() if name not in ("date", "sha256")}


@pytest.mark.slow
def test_several_processes_make_the_files_of_one_and_a_mistake_of_one_ends_all(tmp_path):
    photos = write_pictures(tmp_path / "photos", count=4)
    (photos / "cats" / "3.png").unlink()  # 7 pictures: 4 batches, the last of one picture
    (photos / "dogs" / "0.png").write_bytes(b"no picture")
    made_by_one(photos, tmp_path / "made_by_1")
    for count in (2, 3):
        folder = tmp_path / f"made_by_{count}"
        said, codes = run_together(count, photos, folder)
        assert codes == [2] * count, said
        for rank, (out, err) in enumerate(said):
            lines = out.splitlines()
            if rank == 0:
                assert lines.pop(0).startswith("whole features: reused from ")
            assert lines == [
                f"6 [0, 0, 0, 1, 1, 1] ['{photos}/dogs/0.png: not a picture that Pillow can read']"
            ]
            sentences = [
                line for line in err.splitlines() if line and not line.startswith(("whole", "mistake"))
            ]
            if rank == 0:
                (sentence,) = sentences
                assert sentence.startswith("features: the features of ") and "are not finite" in sentence
            else:
                assert sentences == [] and "Traceback" not in err
        assert contents(folder) == contents(tmp_path / "made_by_1")
        assert sorted(path.name[:6] for path in folder.iterdir() if path.is_dir()) == ["whole-"]
