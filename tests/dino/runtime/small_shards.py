"""Tar shards of tiny pictures, told apart by how red they are."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dino.runtime.options import UserError
from dino.runtime.pictures import Pictures, open_pictures


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(shard: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(shard, "w") as tar:
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return shard


def reds(pictures: Pictures) -> list[int]:
    return [pictures.picture(index).getpixel((0, 0))[0] for index in range(len(pictures))]


def refused(data_path: object, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}$"):
        open_pictures(str(data_path))


def add_link(shard: Path, name: str, target: str) -> None:
    with tarfile.open(shard, "a") as tar:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = tarfile.LNKTYPE, target
        tar.addfile(header)
