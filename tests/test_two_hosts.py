"""Two hosts, which are two network namespaces of this machine, each with its torchrun, and a link that is cut."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dino.pretraining import pretrain
from dino.runtime import distributed
from dino.train_options import TrainOptions
from tests.dino.small_runs import load, rows, write_pictures
from tests.test_commands import flags
from tests.test_faults import OPTIONS, assert_close_run, wait_for

pytestmark = pytest.mark.slow

PORT = 29511


class TwoHosts:
    """Named after this process, so that test runs side by side do not meet."""

    def __init__(self):
        self.names = [f"dino{os.getpid()}{side}" for side in "ab"]
        self.devices = [f"v{os.getpid()}{side}" for side in "ab"]
        self.addresses = ["10.213.77.1", "10.213.77.2"]

    def __enter__(self):
        _ip("netns", "add", self.names[0])
        _ip("netns", "add", self.names[1])
        _ip("link", "add", "dev", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def set_link(self, state):
        _ip("-n", self.names[0], "link", "set", self.devices[0], state)

    def torchrun(self, side, options, log):
        """One host's torchrun: the rendezvous is on the first."""
        settings = {
            "nnodes": 2,
            "nproc_per_node": 1,
            "max_restarts": 3,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": f"{self.addresses[0]}:{PORT}",
            "rdzv_id": "two-hosts",
            "rdzv_conf": f"is_host={int(side == 0)},read_timeout=20,join_timeout=200",
            "local_addr": self.addresses[side],
        }
        command = ["-m", "torch.distributed.run", *flags(**settings), "-m", "dino.train", *options]
        environment = {
            "GLOO_SOCKET_IFNAME": self.devices[side],
            "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_ERROR_FILE": "",
        }
        with log.open("a") as said:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[side], sys.executable, *command],
                env={**os.environ, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    if not shutil.which("ip"):
        pytest.skip("network namespaces are made with `ip`, which is not installed here")
    try:
        with TwoHosts() as made:
            yield made
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")


def test_a_cut_link_ends_both_hosts_and_with_the_link_back_the_run_goes_on(hosts, tmp_path, monkeypatch):
    pictures = write_pictures(tmp_path / "pictures", count=24)
    folder = tmp_path / "run"
    options = flags(**{**OPTIONS, "epochs": 6, "wait_minutes": 0.1}, data_path=pictures, output_dir=folder)
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    runs = [hosts.torchrun(side, options, logs[side]) for side in range(2)]
    try:
        wait_for(lambda: (folder / "log.txt").exists() and len(rows(folder)) >= 1, runs[0])
        hosts.set_link("down")
        cut = time.monotonic()
        for side in range(2):
            wait_for(lambda log=logs[side]: "for the others in vain" in log.read_text(), runs[side])
        assert time.monotonic() - cut < 60
        done = load(folder)["epoch"]
        assert 1 <= done < 6
        hosts.set_link("up")
        assert [run.wait(timeout=200) for run in runs] == [0, 0]
    except BaseException:
        print(*(log.read_text() for log in logs), sep="\n-----\n")
        raise
    finally:
        for run in runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
    said = "".join(log.read_text() for log in logs)
    assert said.count("one of them hangs or needs longer, or the network between them is cut") == 2
    assert f"resumed:   {folder} after {done} epochs" in said
    monkeypatch.setattr(distributed, "usable_cores", lambda: 1)
    whole = tmp_path / "whole"
    pretrain(TrainOptions(**{**OPTIONS, "epochs": 6}, data_path=str(pictures), output_dir=str(whole)))
    assert_close_run(folder, whole, atol=1e-4)
