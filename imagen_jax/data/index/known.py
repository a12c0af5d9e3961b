"""Which shards are indexed already.

A shard's rows are kept in a file named after the rules of the check and the shard's name, size and
content tag: a hash of blocks spread over it. So a shard of a copied folder is known, and a pass
that was killed goes on after its last finished shard. The tag is read only where no earlier index
lists the shard with the same modification time. A file that was rewritten in place is new, whatever
its tag. An object of a bucket is known by its name and tag (`io/mirrors.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from imagen_jax.data.index import shard as shard_file
from imagen_jax.data.sources.records import ShardedReader
from imagen_jax.io import mirrors

FILES = "files.json"  # In an index: path, size, modification time and file of each shard.
_BLOCKS, _BLOCK_BYTES = 16, 4096
UNKNOWN_SIZE = 1 << 26  # Bytes that an object counts as; tensorstore's lists have no sizes.


class ShardFile(NamedTuple):
    """A shard and the file of its rows.

    Attributes:
      path: of the shard.
      size, mtime_ns, inode: of the shard; of an object in a bucket UNKNOWN_SIZE, 0 and 0.
      rows: path of the file of its rows, which exists if the shard is known.
    """

    path: pathlib.Path
    size: int
    mtime_ns: int
    inode: int
    rows: pathlib.Path

    @property
    def stat(self) -> list[int]:
        """What the report of the rows records of the shard."""
        return [self.size, self.mtime_ns, self.inode]


def identify(reader: ShardedReader, rules: Sequence[Any], cache: pathlib.Path) -> list[ShardFile]:
    """Finds the file of the rows of each shard.

    Args:
      reader: of the source.
      rules: JSON values that determine the rows of a shard.
      cache: folder of the indexes.
    """
    prefix = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:8]
    folder = cache / "shards"
    listed = _listed(cache, prefix)
    found = []
    tags = mirrors.tags(reader.shards)
    for path, tag in zip(reader.shards, tags or (), strict=False):
        name = f"{prefix}_{_digest([path.name, tag])}.safetensors"
        found.append(ShardFile(path, UNKNOWN_SIZE, 0, 0, folder / name))
    for path in reader.shards if tags is None else ():
        status = path.stat()
        stat = (status.st_size, status.st_mtime_ns, status.st_ino)
        name = listed.get((_relative(path, cache), stat[0], stat[1]))
        if name is None or not (folder / name).exists():
            name = _name(prefix, path, stat, folder)
        found.append(ShardFile(path, *stat, folder / name))
    return found


def write_files(folder: pathlib.Path, shards: Iterable[ShardFile], cache: pathlib.Path) -> None:
    """Writes the list by which later passes know the shards without reading them."""
    rows = [[_relative(s.path, cache), s.size, s.mtime_ns, s.rows.name] for s in shards]
    (folder / FILES).write_text(json.dumps(rows), encoding="utf-8")


def _listed(cache: pathlib.Path, prefix: str) -> dict[tuple[str, int, int], str]:
    """Files of rows by path, size and modification time of the shard."""
    found = {}
    for path in sorted(cache.glob(f"index_*/{FILES}")):
        for name, size, mtime_ns, file in json.loads(path.read_text("utf-8")):
            if file.startswith(prefix):
                found[name, size, mtime_ns] = file
    return found


def _relative(path: pathlib.Path, cache: pathlib.Path) -> str:
    """The path of a shard as seen from the index, which a copy of both keeps."""
    return os.path.relpath(path, cache)


def _name(prefix: str, path: pathlib.Path, stat: tuple[int, int, int], folder: pathlib.Path) -> str:
    parts: list[Any] = [path.name, stat[0], content_tag(path, stat[0])]
    name = f"{prefix}_{_digest(parts)}.safetensors"
    if (folder / name).exists():
        _, mtime_ns, inode = shard_file.read_report(folder / name)["stat"]
        if inode == stat[2] and mtime_ns != stat[1]:
            return f"{prefix}_{_digest([*parts, stat[1]])}.safetensors"
    return name


def content_tag(path: pathlib.Path, size: int) -> str:
    """A hash of blocks spread over a file, its first and last bytes included."""
    digest = hashlib.sha256()
    last = max(size - _BLOCK_BYTES, 0)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in sorted({last * k // (_BLOCKS - 1) for k in range(_BLOCKS)}):
            digest.update(os.pread(descriptor, _BLOCK_BYTES, offset))
    finally:
        os.close(descriptor)
    return digest.hexdigest()[:32]


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
