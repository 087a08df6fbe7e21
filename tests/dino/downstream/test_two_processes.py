"""Two processes train one network, and the same as one process does."""

import json
from dataclasses import asdict

import pytest
import torch

from dino.downstream.classification.task import classify
from dino.runtime import checkpoint, distributed
from tests.dino.downstream.classification.test_classify import options, rows
from tests.dino.small_runs import write_pictures
from tests.two_processes import both_finish

RUN = """
import json, os, sys
from dino.downstream.classification.task import classify
from dino.downstream.classification.options import ClassifyOptions
values = json.loads(sys.argv[1])
classify(ClassifyOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
print("DONE", os.environ["RANK"])
"""

# Draws of a step depend on the process: none of them here.
PLAIN = {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "epochs": 2, "lr": 0.01}


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_share_the_evaluation(tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    write_pictures(pictures / "train", count=16)
    write_pictures(pictures / "val", count=5, seed=1)
    together, alone = tmp_path / "together", tmp_path / "alone"
    said = both_finish(RUN, json.dumps(asdict(options(pictures, together, batch_size=4, **PLAIN))))
    assert "after 8 steps" in said[0] and "after 8 steps" not in said[1]
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    classify(options(pictures, alone, batch_size=8, **PLAIN))
    found, wanted = (checkpoint.load(folder / "checkpoint.pth") for folder in (together, alone))
    for name, value in wanted["model"].items():
        assert torch.allclose(found["model"][name], value, atol=2e-4), name
    for one, other in zip(rows(together), rows(alone), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-2)
        assert one["test_acc1"] == other["test_acc1"]
    classify(options(pictures, together, batch_size=8, **{**PLAIN, "epochs": 3}))
    assert [row["epoch"] for row in rows(together)] == [0, 1, 2]
