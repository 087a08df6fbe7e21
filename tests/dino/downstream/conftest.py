"""Commands share the cores out among threads and workers; in tests each takes one."""

import pytest

from dino.runtime import distributed, run_log


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    monkeypatch.setattr(run_log, "_tensorboard", lambda folder: None)
