"""Shared by all tests: one thread for torch, and the real pictures where they are at hand."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Several test processes with several threads each make one another wait; tensors here are tiny anyway.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts jobs in the background with Ctrl-C ignored; what happens on Ctrl-C is tested there too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Commands share the cores out; what comes after them in this process is to compute as if alone."""
    yield
    torch.set_num_threads(1)


_SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Folder of real pictures and videos beside the checkout; tests that need it are skipped without it."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"real pictures are not at hand ({_SHARED_DATA})")
    return _SHARED_DATA
