"""Local folders that stand for folders in a bucket.

A mirror holds an empty file for each object below an address, so readers list, match and sort names
as on a disk. `origin` gives the address of such a file, whose content is read from the store: by
ranges, or whole where a file is scanned once. Mirrors lie in the user's cache.

The names are listed once, by `prepare`, and kept in the bucket (`.imagen_index/objects.json`), with
tags that change when an object is written again. Every later start reads this one object.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from imagen_jax.io import atomic, buckets
from imagen_jax.io.buckets import BucketError

OWN = ".imagen_index"  # Folder beside the data, in which all that this package adds lies.
_OBJECTS = f"{OWN}/objects.json"
_PATTERN = re.compile(r"[*?\[]")


def home() -> pathlib.Path:
    """The folder of all mirrors: in the user's cache, else among the temporary files."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache):  # Without a home folder it is not.
        root = pathlib.Path(cache) / "imagen_jax" / "buckets"
        if os.access(next(folder for folder in (root, *root.parents) if folder.exists()), os.W_OK):
            return root
    return pathlib.Path(tempfile.gettempdir()) / f"imagen_jax_{os.getuid()}" / "buckets"


def folder(address: str, name: str = "") -> pathlib.Path:
    """The local folder that stands for an address; it is created, and nothing is read.

    Args:
      address: of a folder in a bucket.
      name: of one of several mirrors of the address; "": that of all processes.

    Raises:
      BucketError: the folder of all mirrors belongs to another user.
    """
    key = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:24]
    root = home() / (f"{key}-{name}" if name else key)
    root.mkdir(parents=True, exist_ok=True)
    if home().parent.stat().st_uid != os.getuid():
        raise BucketError(
            f"{home().parent} belongs to another user; set XDG_CACHE_HOME to a folder"
        )
    if not _address_file(root).exists():
        atomic.write_text(_address_file(root), address.rstrip("/"))
    return root


def forget(root: pathlib.Path) -> None:
    """Removes what is kept beside a mirror whose folder was removed."""
    for suffix in (".txt", ".json"):
        root.with_name(root.name + suffix).unlink(missing_ok=True)


def origin(path: str | os.PathLike[str]) -> str | None:
    """The address that a path below a mirror stands for; None: it is an ordinary path."""
    try:
        parts = pathlib.Path(path).relative_to(home()).parts
    except ValueError:
        return None
    if not parts or not _address_file(home() / parts[0]).exists():
        return None
    return buckets.join(_address(home() / parts[0]), *parts[1:])


def files(address: str, *, fresh: bool = False) -> pathlib.Path:
    """A mirror of the files that an address names.

    Args:
      address: of an object, a folder, or a pattern with *, ? or [].
      fresh: list the bucket, also where an earlier list is kept in it.

    Returns:
      The local path of the object, folder or pattern.

    Raises:
      BucketError: there is nothing, or the store does not answer.
    """
    found = _PATTERN.search(address)
    if found:
        base = address[: found.start()].rpartition("/")[0]
    elif not fresh and _published(address) is not None:
        base = address
    else:
        base = address.rpartition("/")[0] if buckets.tag(address) else address
    base = base.rstrip("/")
    name = address.rstrip("/")[len(base) :].lstrip("/")
    single = bool(name) and not found
    root = folder(base, hashlib.sha256(name.encode()).hexdigest()[:8] if single else "")
    listed = None if fresh or single else _published(base)
    if listed is None:
        listed = {"names": [name] if single else _data(base), "tags": {}}
        if not listed["names"]:
            raise BucketError(f"{address} holds nothing; check the address and the rights to it")
        _publish(base, listed, single)
    # The list in the bucket is of whoever may write there.
    listed["names"] = list(filter(buckets.is_inside, listed["names"]))
    _touch(root, listed["names"])
    _write_list(root, {**listed, "single": single})
    return root / name if name else root


def tags(paths: Sequence[pathlib.Path]) -> list[str] | None:
    """The tags of files of one mirror, read where they are not known; None: of local files.

    Raises:
      BucketError: an object is gone, or the store does not answer.
    """
    if not paths or origin(paths[0]) is None:
        return None
    root = home() / paths[0].relative_to(home()).parts[0]
    base, listed = _address(root), _read_list(root)
    names = [path.relative_to(root).as_posix() for path in paths]
    missing = [name for name in names if name not in listed["tags"]]
    if missing:
        with ThreadPoolExecutor(buckets.THREADS) as pool:
            found = list(pool.map(buckets.tag, [buckets.join(base, name) for name in missing]))
        for name, tag in zip(missing, found, strict=True):
            if not tag:
                raise BucketError(f"{base}/{name} is gone; run `imagen prepare` again")
        listed["tags"] |= dict(zip(missing, found, strict=True))
        single = listed.pop("single")
        _publish(base, listed, single)
        _write_list(root, {**listed, "single": single})
    return [listed["tags"][name] for name in names]


def read_bytes(path: pathlib.Path) -> bytes:
    """The content of a file, or of the object that it stands for."""
    address = origin(path)
    return path.read_bytes() if address is None else buckets.read(address).data


@contextlib.contextmanager
def copies(paths: Sequence[pathlib.Path], root: pathlib.Path) -> Iterator[pathlib.Path]:
    """A context with a folder that holds the contents of files of a mirror.

    Args:
      paths: files below `root`.
      root: the folder in the mirror.

    Yields:
      The local folder, with the same names.
    """
    with tempfile.TemporaryDirectory(prefix="imagen_") as name:
        target = pathlib.Path(name)

        def copy(path: pathlib.Path) -> None:
            to = target / path.relative_to(root)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(read_bytes(path))

        with ThreadPoolExecutor(buckets.THREADS) as pool:
            list(pool.map(copy, paths))
        yield target


def _data(base: str) -> list[str]:
    """Names of the objects below an address, without those of this package."""
    return [name for name in buckets.names(base) if OWN not in name.split("/")]


def _published(base: str) -> dict[str, Any] | None:
    try:
        return json.loads(buckets.read(buckets.join(base, _OBJECTS)).data)
    except buckets.MissingError:
        return None


def _publish(base: str, listed: dict[str, Any], single: bool) -> None:
    if not single:
        with contextlib.suppress(BucketError):  # A public bucket may be read-only for this user.
            buckets.write(buckets.join(base, _OBJECTS), json.dumps(listed).encode())


def _address_file(root: pathlib.Path) -> pathlib.Path:
    """The file beside a mirror that names its address."""
    return root.with_name(f"{root.name}.txt")


@functools.lru_cache(1024)
def _address(root: pathlib.Path) -> str:
    return _address_file(root).read_text("utf-8")


def _write_list(root: pathlib.Path, content: dict[str, Any]) -> None:
    atomic.write_text(root.with_name(f"{root.name}.json"), json.dumps(content))


def _read_list(root: pathlib.Path) -> dict[str, Any]:
    """Names and tags of the objects of a mirror."""
    path = root.with_name(f"{root.name}.json")
    if not path.exists():
        return {"names": [], "tags": {}, "single": False}
    return json.loads(path.read_text("utf-8"))


def _touch(root: pathlib.Path, names: Sequence[str]) -> None:
    """Makes the empty files of a mirror, and removes those of objects that are gone."""
    known = set(_read_list(root)["names"])
    for name in known.difference(names):
        (root / name).unlink(missing_ok=True)
    for name in names:
        path = root / name
        if name in known and path.exists():
            continue
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
