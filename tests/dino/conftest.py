"""A few pictures, and a finished run on them."""

import pytest

from dino import pretraining
from dino.pretraining import pretrain
from dino.runtime import distributed, run_log
from tests.dino.small_runs import tiny, write_pictures


@pytest.fixture
def quick(monkeypatch):
    """One thread, and none of the pictures of numbers, which take longer than the training."""
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    monkeypatch.setattr(run_log, "_tensorboard", lambda folder: None)
    monkeypatch.setattr(pretraining, "draw_curves", lambda *_: None)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, pictures):
    """A run of two epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "usable_cores", lambda: 1)
        pretrain(tiny(pictures, folder))
    return folder
