"""Pictures inside tar files, in the layout of WebDataset, read in any order like files in a folder.

The headers are read once, and kept where that takes long; after that a picture costs one seek. So the order and an
exact resume are those of a folder, at the price of reading through the headers of every shard the first time.
"""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from dino.runtime.distributed import is_main
from dino.runtime.file_index import indexed
from dino.runtime.images import BrokenImageError, decode, reading
from dino.runtime.pictures import Pictures, labels_from
from dino.runtime.tar_index import Members, ShardSearch


class TarPictures(Pictures):
    """The pictures in the shards, possibly none, in the order of the shards and of their members.

    Labels are those of `key.cls` beside `key.jpg`, when every picture has one. Other pictures beside `key.jpg`,
    such as `key.seg.png` or `key.png`, are left out.

    Raises:
        UserError: a shard cannot be indexed, holds a file that lies outside of it, or some pictures have a label
            and others none.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = list(shards)
        self._changed = [shard.stat().st_mtime_ns for shard in self._shards]
        found = indexed(self._shards, ShardSearch(self._shards, quiet=not is_main()))
        self._members = Members.from_arrays(found)
        self.classes = list(self._members.classes)
        self.labels = labels_from(self._members.labels)

    def __len__(self) -> int:
        return len(self._members.names)

    def name(self, index: int) -> str:
        shard = self._shards[self._members.shards[index]]
        return f"{shard}/{self._members.names[index]}".encode(errors="replace").decode()

    def picture(self, index: int, *, at_least: int | None = None) -> Image:
        name = self.name(index)
        with reading(name):
            content = self._read(index)
        return decode(io.BytesIO(content), name, at_least=at_least, as_stored=self.as_stored)

    def stamp(self, index: int) -> tuple[str, int, int]:
        shard = int(self._members.shards[index])
        name = f"{self._shards[shard].name}/{self._members.names[index]}".encode(errors="replace").decode()
        return name, int(self._members.sizes[index]), self._changed[shard]

    def _read(self, index: int) -> bytes:
        offset, size = int(self._members.offsets[index]), int(self._members.sizes[index])
        # Opened for every read: an open file can be neither pickled for a worker nor shared by forked ones.
        with self._shards[self._members.shards[index]].open("rb") as stream:
            stream.seek(offset)
            content = stream.read(size)
        if len(content) < size:
            raise BrokenImageError("", "its shard became shorter since the start")
        return content
