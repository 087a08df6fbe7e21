"""A command answers, and a package is there, without what takes seconds to import and is not needed yet."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.start import COMMANDS

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "torchvision", "timm", "matplotlib", "sklearn", "scipy", "faiss", "submitit"}


def loaded(code):
    """Packages that are imported at the end of a fresh process."""
    told = f"import atexit, sys\natexit.register(lambda: print(*sys.modules))\n{code}"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_the_benchmark_starts_every_command():
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "dino").rglob("*.py")
        if 'if __name__ == "__main__"' in path.read_text()
    }
    assert set(COMMANDS) == runnable and len(COMMANDS) == len(runnable)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_loads_nothing_heavy(module):
    code = (
        f'import runpy\nsys.argv = ["command", "--help"]\nrunpy.run_module("{module}", run_name="__main__")'
    )
    assert not loaded(code) & HEAVY


@pytest.mark.parametrize("module", ["dino.attention.render", "dino.curves", "dino.video.writer"])
def test_drawing_loads_neither_torch_nor_matplotlib(module):
    assert not loaded(f"import {module}") & HEAVY


BUILDING = """
from dino.runtime.backbones import class_attention, create_backbone
import torch
class_attention(create_backbone("xcit_pico_3_p8").eval(), torch.zeros(1, 3, 16, 16))
"""


@pytest.mark.parametrize("code", ["import xcit", "import dino.pretraining, dino.attention.maps", BUILDING])
def test_xcit_is_there_with_torch_alone(code):
    assert loaded(code) & HEAVY == {"torch"}
