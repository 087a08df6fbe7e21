"""What only a GPU can show; skipped where there is none."""

import math

import pytest
import torch

from dino.distillation import SelfDistillation
from dino.loader import Batch
from dino.prefetch import Prefetch
from dino.pretraining import pretrain
from tests.dino.small_runs import load, rows, run_until_killed, tiny
from tests.dino.test_distillation import PROTOTYPES, RATES, create_networks, create_views, state_of

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


def test_a_step_does_not_wait_for_the_gpu():
    distillation = SelfDistillation(
        *(network.cuda() for network in create_networks()), num_prototypes=PROTOTYPES, precision="bf16"
    )
    views = [view.cuda() for view in create_views()]
    first = distillation.step(views, RATES)  # looks at the features, whose singular values wait
    assert first.finite
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [distillation.step(views, RATES) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.finite for result in results)


def test_a_step_that_is_not_finite_changes_nothing_on_a_gpu():
    distillation = SelfDistillation(
        *(network.cuda() for network in create_networks()), num_prototypes=PROTOTYPES
    )
    views = create_views()
    distillation.step(views, RATES)
    before = state_of(distillation)
    views[3][1] = math.nan
    assert not distillation.step(views, RATES).finite
    after = state_of(distillation)
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


def test_prefetched_views_are_those_of_their_batches():
    batches = [Batch([torch.full((8, 3, 64, 64), float(number)).pin_memory()], []) for number in range(6)]
    views = Prefetch(
        batches, torch.device("cuda", 0), lambda batch: [v.cuda(non_blocking=True) for v in batch.views]
    )
    assert [each[0].unique().tolist() for each in views] == [[float(number)] for number in range(6)]


def test_a_compiled_run_learns_what_a_plain_one_does(tmp_path, pictures):
    for compiled in ("true", "false"):
        pretrain(tiny(pictures, tmp_path / compiled, device="cuda", compile=compiled, drop_path_rate=0.0))
    ours, plain = (rows(tmp_path / compiled)[-1]["train_loss"] for compiled in ("true", "false"))
    assert ours == pytest.approx(plain, rel=1e-2)
