"""Weights files from the network: once per machine, whole or not at all, the same as the first time."""

import contextlib
import glob
import hashlib
import os
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 20.0
# A process that downloads touches its lock with every chunk; one that was killed stops doing so.
_STALE_LOCK_SECONDS = 3 * _TIMEOUT_SECONDS
_POLL_SECONDS = 0.2


class WeightsError(ValueError):
    """Weights that cannot be had, read or used; the message is one sentence for the user."""


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def fetch(url: str) -> Path:
    """The file behind a URL, in torch's hub cache; the network is used only if it is not there yet.

    The first download records its SHA-256 beside the file, as `sha256sum` writes it, and later calls
    check it. Processes that ask at the same time wait for one download.

    Raises:
        WeightsError: the file is not there and cannot be downloaded, or it has changed.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while not file.exists():
            with _exclusive(_lock_file(file)) as acquired:
                if acquired and not file.exists():
                    _download(url, file)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise WeightsError(
            f"cannot download {url} ({_reason(error)}); connect to the network, or put the file at {file}"
        ) from error
    _verify(file)
    return file


def sha256(file: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _file_name(url: str) -> str:
    """The authors' files keep their names, as torch.hub has them; others' may clash and get a prefix."""
    parts = urlsplit(url)
    name = parts.path.rsplit("/", 1)[-1] or "weights"
    if parts.hostname == "dl.fbaipublicfiles.com" and parts.path.startswith(("/xcit/", "/dino/")):
        # In folders of their own DINO's files are called alike only where they are the same.
        return name
    return f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"


def _download(url: str, file: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "xcit"})
    _remove_stale_parts(file)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        with (
            temporary.open("xb") as target,
            urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as source,
        ):
            _copy(source, target, file)
        _checksum_file(file).write_text(f"{sha256(temporary)}  {file.name}\n")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale_parts(file: Path) -> None:
    """What killed downloads have left."""
    for part in file.parent.glob(f"{glob.escape(file.name)}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _STALE_LOCK_SECONDS:
                part.unlink()


def _copy(source: HTTPResponse, target: BinaryIO, file: Path) -> None:
    """Stream a response to disk with a progress bar, keeping the download's lock fresh."""
    announced = source.headers.get("Content-Length")
    total = int(announced) if announced else None
    received = 0
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=file.name) as bar:
        while chunk := source.read1(_CHUNK_BYTES):
            target.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
            _lock_file(file).touch()
    if total is not None and received != total:
        raise OSError(f"the connection broke after {received} of {total} bytes")


@contextmanager
def _exclusive(lock: Path) -> Iterator[bool]:
    """Hold a lock file, yielding True; or wait a little for whoever holds it, yielding False."""
    try:
        os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        _wait(lock)
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink(missing_ok=True)


def _wait(lock: Path) -> None:
    # Two that find the same stale lock may both download: harmless, as each replaces the file whole.
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > _STALE_LOCK_SECONDS:
            lock.unlink()
            return
    time.sleep(_POLL_SECONDS)


def _verify(file: Path) -> None:
    """Compare a file with its recorded checksum; one without a record was put there by the user."""
    record = _checksum_file(file)
    if not record.exists():
        return
    expected, actual = record.read_text().partition(" ")[0], sha256(file)
    if actual != expected:
        raise WeightsError(
            f"{file} has changed since it was downloaded: its SHA-256 is {actual}, it was {expected}; "
            f"delete it to download it again, or delete {record.name} to keep it"
        )


def _checksum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _lock_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.lock")


def _reason(error: Exception) -> str:
    cause = error.reason if type(error) is URLError else error
    return str(cause) or type(error).__name__
