"""Downloads from a server on this machine: once, whole, and checked."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import xcit
from xcit import WeightsError, load_weights
from xcit.download import _file_name, fetch
from xcit.weights import resolve
from xcit.zoo import PUBLISHED

CONTENT = bytes(range(256)) * 1000


class Server(ThreadingHTTPServer):
    content = CONTENT
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.path == "/absent.pth":
            self.send_error(404)
            return
        time.sleep(0.1)  # long enough for others to ask meanwhile
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content[: 1000 if self.path == "/cut.pth" else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of the test's own, and no proxy on the way to this machine."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "checkpoints"


def test_a_file_is_downloaded_once_and_its_checksum_recorded(server: Server, cache: Path) -> None:
    file = fetch(f"{server.url}/a.pth")
    assert file.read_bytes() == CONTENT
    record = cache / f"{file.name}.sha256"
    assert record.read_text() == f"{hashlib.sha256(CONTENT).hexdigest()}  {file.name}\n"
    assert set(cache.iterdir()) == {file, record}
    assert fetch(f"{server.url}/a.pth") == file
    assert server.requests == 1


def test_those_who_ask_at_once_share_one_download(server: Server) -> None:
    with ThreadPoolExecutor(6) as pool:
        files = list(pool.map(fetch, [f"{server.url}/a.pth"] * 6))
    assert {file.read_bytes() for file in files} == {CONTENT}
    assert server.requests == 1


def test_files_of_one_name_from_two_places_do_not_mix(server: Server) -> None:
    assert fetch(f"{server.url}/one/checkpoint.pth") != fetch(f"{server.url}/two/checkpoint.pth")
    assert server.requests == 2
    host = "https://dl.fbaipublicfiles.com"  # of many projects, some of which name all files alike
    assert _file_name(f"{host}/vissl/one/model_final.torch") != _file_name(
        f"{host}/vissl/two/model_final.torch"
    )


def test_what_killed_downloads_left_is_removed(server: Server) -> None:
    file = fetch(f"{server.url}/weights.pth")
    file.unlink()
    old, young = (file.with_name(f"{file.name}.{age}.part") for age in ("old", "young"))
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    fetch(f"{server.url}/weights.pth")
    assert not old.exists() and young.exists()


def test_a_changed_file_is_refused(server: Server) -> None:
    file = fetch(f"{server.url}/a.pth")
    file.write_bytes(b"changed")
    expected, actual = (hashlib.sha256(content).hexdigest() for content in (CONTENT, b"changed"))
    with pytest.raises(WeightsError) as caught:
        fetch(f"{server.url}/a.pth")
    assert str(caught.value) == (
        f"{file} has changed since it was downloaded: its SHA-256 is {actual}, it was {expected}; "
        f"delete it to download it again, or delete {file.name}.sha256 to keep it"
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent.pth", "HTTP Error 404: Not Found"),
        ("cut.pth", "the connection broke after 1000 of 256000 bytes"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(server: Server, cache: Path, path: str, reason: str) -> None:
    with pytest.raises(WeightsError) as caught:
        fetch(f"{server.url}/{path}")
    assert f"cannot download {server.url}/{path} ({reason}); connect to the network, or put" in str(
        caught.value
    )
    assert list(cache.iterdir()) == []


def dead_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/a.pth"


def test_an_unreachable_server_gets_one_sentence(cache: Path) -> None:
    url = dead_url()
    with pytest.raises(WeightsError) as caught:
        fetch(url)
    message = str(caught.value)
    assert message.startswith(f"cannot download {url} (")
    assert "refused" in message
    assert f"put the file at {cache}" in message
    assert "\n" not in message


def test_a_killed_downloads_lock_is_not_waited_for(server: Server, cache: Path) -> None:
    lock = cache / f"{fetch(f'{server.url}/a.pth').name}.lock"
    (cache / lock.stem).unlink()
    lock.touch()
    os.utime(lock, (0, 0))
    assert fetch(f"{server.url}/a.pth").read_bytes() == CONTENT
    assert not lock.exists()


def test_published_files_keep_their_names_and_need_no_network_when_there(cache: Path) -> None:
    cache.mkdir()
    for name in PUBLISHED:
        file = cache / PUBLISHED[name].url.rsplit("/", 1)[-1]
        file.touch()
        assert resolve(name) == file


def test_weights_load_from_a_url(server: Server, tmp_path: Path) -> None:
    model = xcit.create_model("xcit_pico_3_p8")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    server.content = (tmp_path / "a.pth").read_bytes()
    report = load_weights(xcit.create_model("xcit_pico_3_p8"), f"{server.url}/a.pth")
    assert report.matched == report.total
    assert report.sha256 == hashlib.sha256(server.content).hexdigest()
