"""Indexes of files, kept from the first moment on and away from the user's own."""

from pathlib import Path

import pytest

from dino.runtime import file_index


@pytest.fixture
def indexes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the indexes: one of every search is kept, however quick it was and recent the last change."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(file_index, "_QUICK", -1)
    monkeypatch.setattr(file_index, "_TICK", 0)
    return cache / "dino-xcit" / "indexes"
