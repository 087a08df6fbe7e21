"""The benchmarks of the features in processes of their own, alone and under torchrun."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dino.evaluation.feature_files import dump_features
from dino.runtime.backbones import create_backbone
from tests.dino.small_runs import rows, write_pictures
from tests.test_commands import TORCHRUN, flags, run

ROOT = Path(__file__).parents[1]
KNN, LINEAR = ROOT / "eval_knn.py", ROOT / "eval_linear.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "train", count=12)
    write_pictures(root / "val", count=4, seed=1)
    (root / "val" / "cats" / "2.png").write_bytes(b"no picture")
    torch.manual_seed(0)
    torch.save(create_backbone("xcit_pico_3_p8").state_dict(), root / "weights.pth")
    return root


@pytest.fixture(scope="module")
def small(pictures):
    return flags(
        arch="xcit_pico_3_p8",
        pretrained_weights=pictures / "weights.pth",
        data_path=pictures,
        image_size=16,
        num_workers=0,
        device="cpu",
        batch_size_per_gpu=5,
    )


def dinos_lines(output):
    return [line for line in output.splitlines() if "classifier result" in line]


@pytest.mark.slow
def test_the_scripts_of_the_root_run_from_anywhere_without_environment_variables(pictures, small, tmp_path):
    done = subprocess.run(
        [sys.executable, str(KNN), *small, "--nb_knn", "3", "100"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in dinos_lines(done.stdout)] == ["3-NN", "100-NN"]
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "results.json").read_text())["knn"]["processes"] == 1


@pytest.mark.slow
def test_two_processes_find_what_one_finds(small, tmp_path):
    alone, _ = run(KNN, *small, *flags(nb_knn=3, output_dir=tmp_path / "one"))
    together, _ = run(*TORCHRUN, KNN, *small, *flags(nb_knn=3, output_dir=tmp_path / "two"))
    assert dinos_lines(together) == dinos_lines(alone)
    assert together.count("classifier result") == together.count("left out: ") == 1
    (knn,) = json.loads((tmp_path / "two" / "results.json").read_text()).values()
    assert knn["processes"] == 2 and knn["pictures"] == {"train": 24, "val": 7}


@pytest.mark.slow
def test_of_two_processes_one_judges_features_that_are_loaded(tmp_path):
    labels = np.arange(12) % 3
    dump_features(str(tmp_path), np.eye(3)[labels], labels, np.eye(3), np.arange(3))
    out, _ = run(
        *TORCHRUN, KNN, *flags(load_features=tmp_path, nb_knn=3, output_dir=tmp_path / "out", device="cpu")
    )
    assert dinos_lines(out) == ["3-NN classifier result: Top1: 100.0, Top5: 100.0"]


@pytest.mark.slow
def test_two_processes_train_the_classifier_of_one_with_twice_the_batch(small, tmp_path):
    common = (*small, *flags(protocol="original", epochs=3, lr=2, val_freq=2))
    run(LINEAR, *common, *flags(batch_size_per_gpu=10, output_dir=tmp_path / "one"))
    together, _ = run(*TORCHRUN, LINEAR, *common, *flags(output_dir=tmp_path / "two"))
    assert together.count("Top-1 test accuracy") == 1
    one, two = (
        torch.load(tmp_path / run / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        for run in ("one", "two")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_sentence(small, tmp_path):
    _, err = run(*TORCHRUN, LINEAR, *small, *flags(data_path="/nowhere", output_dir=tmp_path), code=1)
    said = [line for line in err.splitlines() if line.startswith("eval_linear.py: ")]
    assert said == ["eval_linear.py: /nowhere is no file or folder, nor demo, nor a data set of torchvision"]


HELP = """
import atexit, runpy, sys
atexit.register(lambda: print("torch was imported" if "torch" in sys.modules else ""))
sys.argv = [sys.argv[1], "--help"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_help_answers_without_torch_and_names_every_flag_of_the_originals():
    originals = {
        KNN: "batch_size_per_gpu nb_knn temperature pretrained_weights use_cuda arch patch_size checkpoint_key "
        "dump_features load_features num_workers dist_url local_rank data_path",
        LINEAR: "n_last_blocks avgpool_patchtokens arch patch_size pretrained_weights checkpoint_key epochs lr "
        "batch_size_per_gpu dist_url local_rank data_path num_workers val_freq output_dir num_labels evaluate",
    }
    for script, names in originals.items():
        out, _ = run("-c", HELP, script)
        assert "torch was imported" not in out
        assert [
            name for name in names.split() if f"--{name.replace('_', '-')}" not in out.replace("_", "-")
        ] == []
