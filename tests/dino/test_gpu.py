"""What only a GPU can show; skipped where there is none."""

import pytest
import torch

from dino.pretraining import pretrain
from tests.dino.small_runs import load, rows, run_until_killed, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("quick"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_step_on_a_gpu_is_that_of_a_cpu(tmp_path, pictures, finished):
    pretrain(tiny(pictures, tmp_path, device="cuda", epochs=1))
    on_cpu, on_gpu = rows(finished)[0], rows(tmp_path)[0]
    assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_killed_run_in_mixed_precision_goes_on(precision, tmp_path, pictures):
    options = tiny(pictures, tmp_path, device="cuda", precision=precision, save_every_minutes=1e-9, epochs=4)
    run_until_killed(options, 6)
    pretrain(options)
    assert load(tmp_path)["epoch"] == 4
    assert all(row["train_loss"] is not None for row in rows(tmp_path))
