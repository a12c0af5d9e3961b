"""The index of data in a bucket: kept beside the data as one object, used from a local copy.

`BUCKET/.../.imagen_index/index_HASH.tar` holds the folder of an index and the files of its shards'
rows. One host makes it; the others read it with one request. The name follows from the names and
tags of the objects and the rules of the check, so an index of other data has another name.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import tarfile
import tempfile

from imagen_jax.data.index.known import FILES
from imagen_jax.io import atomic, buckets, mirrors

_NEWEST = "newest.txt"  # Names the last index, from whose shards another one may be made.


def pull(cache: pathlib.Path, name: str) -> bool:
    """Copies an index out of the bucket.

    Args:
      cache: folder of the indexes, in a mirror; an ordinary folder has no shared index.
      name: of the index.

    Returns:
      Whether there is one. Else the rows of the newest index are copied, as shards that are known.

    Raises:
      BucketError: the store does not answer.
    """
    address = mirrors.origin(cache)
    if address is None:
        return False
    try:
        _unpack(buckets.read(buckets.join(address, f"{name}.tar")).data, cache)
        return True
    except buckets.MissingError:
        pass
    with contextlib.suppress(buckets.MissingError):
        newest = buckets.read(buckets.join(address, _NEWEST)).data.decode()
        _unpack(buckets.read(buckets.join(address, f"{newest}.tar")).data, cache)
    return False


def push(cache: pathlib.Path, name: str) -> None:
    """Copies an index into its bucket, unless that is read-only; `cache`, `name` as of `pull`."""
    address = mirrors.origin(cache)
    if address is None:
        return
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path in sorted((cache / name).iterdir()):
            tar.add(path, f"{name}/{path.name}")
        for file in _rows(cache / name):
            tar.add(cache / "shards" / file, f"shards/{file}")
    with contextlib.suppress(buckets.BucketError):
        buckets.write(buckets.join(address, f"{name}.tar"), content.getvalue())
        buckets.write(buckets.join(address, _NEWEST), name.encode())


def _rows(index: pathlib.Path) -> list[str]:
    """Names of the files of the rows of an index."""
    entries = json.loads((index / "shards.json").read_text("utf-8"))
    listed = json.loads((index / FILES).read_text("utf-8")) if (index / FILES).exists() else []
    return sorted({entry[1] for entry in entries} | {row[3] for row in listed})


def _unpack(data: bytes, cache: pathlib.Path) -> None:
    """Adds the files of an archive to a folder of indexes; those that exist stay."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull.", dir=cache) as temporary:
        root = pathlib.Path(temporary)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(root, filter="data")
        (cache / "shards").mkdir(exist_ok=True)
        for path in (root / "shards").glob("*"):
            path.replace(cache / "shards" / path.name)
        for path in root.glob("index_*"):
            with atomic.folder(cache / path.name, replace=False) as target:
                for file in path.iterdir():
                    file.replace(target / file.name)
