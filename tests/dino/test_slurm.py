"""The command for clusters: what sbatch gets, and what is refused before anything is queued."""

import os
import pickle
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from dino import slurm
from dino.slurm_job import PretrainingJob
from dino.slurm_options import SlurmOptions, SlurmTraining, defaults, job_folder, training_options
from dino.train_options import TrainOptions
from tests.fake_programs import put

ASKED = "python -m dino.slurm: "


@pytest.fixture
def call(monkeypatch, capsys):
    """The command in this process: exit code, standard output and error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dino-slurm", *map(str, arguments)])
        try:
            slurm.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster whose sbatch keeps what it gets and gives it the number 1234."""
    bin_folder = put(tmp_path / "bin", "srun", "exit 1")
    put(bin_folder, "sbatch", f"cp $1 {tmp_path}/got.sh; env > {tmp_path}/env; echo Submitted batch job 1234")
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return tmp_path


def asked_of_sbatch(script):
    """Its options by name, as sbatch reads them."""
    words = [shlex.split(line) for line in re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)]
    assert all(len(word) == 1 for word in words)
    return {name: value for name, _, value in (word[0].removeprefix("--").partition("=") for word in words)}


def srun_line(script):
    (line,) = re.findall(r"^srun .*$", script, re.MULTILINE)
    return shlex.split(line)


def test_the_flags_of_the_originals_keep_names_and_defaults_without_a_cluster_of_theirs():
    found = {field.name: field.default for field in fields(SlurmOptions)}
    expected = {"ngpus": 8, "nodes": 2, "timeout": 2800, "partition": "", "use_volta32": False, "comment": ""}
    assert {name: found[name] for name in expected} == expected
    assert found["job_dir"] == ""


def test_no_flag_has_two_meanings():
    of_cluster, of_training = (
        {field.name for field in fields(kind)} for kind in (SlurmOptions, TrainOptions)
    )
    assert not of_cluster & of_training
    assert {field.name for field in fields(SlurmTraining)} == of_cluster | of_training


def test_without_options_the_script_asks_for_what_the_original_asks_and_for_nobodys_cluster(call, tmp_path):
    code, out, err = call("--output_dir", tmp_path / "run", "--dry_run")
    assert (code, err) == (0, "")
    assert asked_of_sbatch(out) == {
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "10",
        "time": "2800",
        "signal": "USR2@120",
        "requeue": "",
        "open-mode": "append",
        "job-name": "dino",
        "output": f"{tmp_path}/run/slurm/%j_0_log.out",
        "error": f"{tmp_path}/run/slurm/%j_0_log.err",
    }
    srun = srun_line(out)
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=10", f"{tmp_path}/run/slurm/%j_%t_log.out"} <= set(srun)
    assert srun[-5:] == [sys.executable, "-u", "-m", "submitit.core._submit", f"{tmp_path}/run/slurm"]


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["--nodes=1", "--ngpus=4"], {"nodes": "1", "gpus-per-node": "4", "ntasks-per-node": "4"}),
        (["--ngpus=0"], {"gpus-per-node": None, "ntasks-per-node": "1"}),
        (["--ngpus=0", "--tasks_per_node=3"], {"gpus-per-node": None, "ntasks-per-node": "3"}),
        (
            ["--partition=gpu", "--account=us", "--qos=low"],
            {"partition": "gpu", "account": "us", "qos": "low"},
        ),
        (["--use_volta32"], {"constraint": "volta32gb"}),
        (["--use_volta32", "--constraint=a|b"], {"constraint": "volta32gb&a|b"}),
        (["--comment", "it's due, $HOME"], {"comment": "it's due, $HOME"}),
        (["--mem_gb=320", "--cpus_per_task=0"], {"mem": "320GB", "cpus-per-task": None}),
        (["--timeout=60", "--signal_delay=300"], {"time": "60", "signal": "USR2@300"}),
        (["--exclude=n[1-3]", "--job_name=a b"], {"exclude": "n[1-3]", "job-name": "a b"}),
        (["--sbatch", "mail-type=END", "exclusive"], {"mail-type": "END", "exclusive": ""}),
        (["--job_dir=/jobs/%j"], {"output": "/jobs/%j/%j_0_log.out"}),
    ],
)
def test_each_flag_reaches_the_script(call, arguments, asked):
    code, out, _ = call("--output_dir=/nowhere/run", *arguments, "--epochs=30", "--dry_run")
    found = asked_of_sbatch(out)
    assert code == 0
    assert {name: found.get(name) for name in asked} == asked


def test_setup_stands_before_the_run(call):
    _, out, _ = call(
        "--output_dir=/nowhere/run", "--dry_run", "--setup", "module load cuda", "export A='b c'"
    )
    lines = out.splitlines()
    start = lines.index("module load cuda")
    assert lines[start + 1] == "export A='b c'"
    assert any(line.startswith("srun ") for line in lines[start:])


def test_a_dry_run_needs_no_slurm_and_makes_no_folder(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, _ = call("--output_dir", tmp_path / "run", "--dry_run", "true")
    assert (code, out[:11]) == (0, "#!/bin/bash")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--epoch", "3"], "--epoch"),
        (["--node", "3"], "--node"),
        (["--lr", "-1"], "--lr must be 0 or more, got -1.0"),
        (["--preset", "tinny"], "did you mean tiny?"),
        (["--nodes", "0"], "--nodes must be 1 or more, got 0"),
        (["--ngpus", "-1"], "--ngpus must be 0 or more, got -1"),
        (
            ["--timeout", "2", "--signal_delay", "120"],
            "--signal_delay must be less than --timeout (2 minutes)",
        ),
        (["--tasks_per_node", "2"], "--tasks_per_node must be that of the GPUs (8), or 0, got 2"),
        (["--device", "cpu"], "--device cpu needs no GPU: give --ngpus 0"),
        (["--device", "cuda:0", "--ngpus", "0"], "--device cuda:0 with --ngpus 0"),
        (["--cluster", "local"], "--nodes must be 1 with --cluster local, got 2"),
        (["--cluster", "debug", "--nodes", "1"], "--cluster debug is one process"),
        (["--sbatch", "exclusive=", "--nodes", "1"], "--sbatch exclusive=: write name=value"),
        (["--sbatch", "a b"], "--sbatch a b: write name=value"),
        (["--job_dir", "jobs/%x"], "jobs/%x: a % in a folder's name"),
    ],
)
def test_a_mistake_is_said_in_one_sentence_before_anything_is_queued(call, cluster, arguments, problem):
    code, out, err = call(*arguments, "--output_dir", cluster / "run")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(ASKED) and problem in err
    assert [path.name for path in cluster.iterdir()] == ["bin"]


def test_a_run_without_a_folder_is_refused(call, cluster):
    code, _, err = call("--data_path", "demo")
    assert code == 2
    assert "--output_dir must be given" in err


def test_without_sbatch_the_ways_out_are_named(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("--output_dir", tmp_path / "run")
    assert code == 2
    assert all(word in err for word in ("no sbatch and no srun here", "--dry_run", "--cluster local"))
    assert not (tmp_path / "run").exists()


def test_without_submitit_the_extra_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = call("--output_dir", tmp_path / "run", "--dry_run")
    assert (code, err) == (2, f"{ASKED}submitit is not installed: pip install 'dino-xcit[slurm]'\n")


def test_help_names_both_sets_and_imports_neither_torch_nor_submitit():
    tell = "import sys, atexit\natexit.register(lambda: print(*sys.modules))\nfrom dino.slurm import main\nmain()"
    done = subprocess.run([sys.executable, "-c", tell, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--ngpus" in done.stdout and "--local_crops_number" in done.stdout
    assert not {"torch", "submitit", "numpy"} & set(done.stdout.splitlines()[-1].split())


def test_sbatch_gets_the_script_of_the_dry_run_and_the_job_the_options(call, cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/etc/ours.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "us")
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # as within an interactive job
    arguments = ["--nodes=1", "--ngpus=2", "--preset=tiny", f"--output_dir={cluster}/%j/run", "--lr=0.5"]
    _, script, _ = call(*arguments, "--dry_run")
    code, out, err = call(*arguments)
    assert (code, err) == (0, "")
    assert (cluster / "got.sh").read_text() == script.removesuffix("\n")
    folder = cluster / "1234" / "run" / "slurm"
    for line in (
        "submitted: job 1234 on 1 machine x 2 processes",
        f"watch:     tail -F {folder}/1234_0_log.out",
        "state:     squeue --jobs=1234",
        "cancel:    scancel 1234",
    ):
        assert line in out
    environment = (cluster / "env").read_text().splitlines()
    assert {"SLURM_CONF=/etc/ours.conf", "SBATCH_ACCOUNT=us"} <= set(environment)
    assert not [line for line in environment if line.startswith("SLURM_JOB_ID")]
    with (folder / "1234_submitted.pkl").open("rb") as file:
        submitted = pickle.load(file)
    expected = replace(defaults(["--preset=tiny"]), preset="tiny", lr=0.5, output_dir=f"{cluster}/%j/run")
    assert submitted.function == PretrainingJob(training_options(expected))
    assert submitted._timeout_countdown == 30
    assert submitted._timeout_min == 2800


def test_what_sbatch_says_against_the_job_is_one_sentence(call, cluster):
    put(cluster / "bin", "sbatch", "echo 'sbatch: error: invalid partition: gpus' >&2; exit 1")
    code, out, err = call("--output_dir", cluster / "run", "--partition", "gpus")
    assert (code, out) == (2, "")
    assert err == f"{ASKED}sbatch refused the job: sbatch: error: invalid partition: gpus\n"


def test_folders_are_whole_paths_and_home_is_resolved(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = replace(defaults([]), output_dir="~/run")
    assert training_options(given).output_dir == f"{tmp_path}/run"
    assert job_folder(given) == tmp_path / "run" / "slurm"
    assert job_folder(replace(given, job_dir="jobs")) == tmp_path / "jobs"
