"""Finds the files of a source and reads byte ranges from them, on a disk or in a bucket."""

from __future__ import annotations

import collections
import glob
import os
import pathlib
import re
import tempfile
import threading
from collections.abc import Callable, Sequence

from imagen_jax.config.fields import ConfigError
from imagen_jax.io import buckets, mirrors
from imagen_jax.io.images import ImageError

CACHE = mirrors.OWN  # Folder of an index, beside the data.
MAX_COPIES = 2  # Of objects, at the same time.
MAX_OPEN_FILES = 512  # Files; common limits on open files begin at 1024.


def find(path: str, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """Finds the files that `config.data.path` names, sorted.

    Args:
      path: a file, a folder or a pattern with *, ? or [].
      suffixes: suffixes of the files in a folder.

    Raises:
      ConfigError: no files.
    """
    if os.path.isfile(path):
        return [pathlib.Path(path)]
    if os.path.isdir(path):
        names = sorted(p for p in pathlib.Path(path).rglob("*") if p.name.endswith(tuple(suffixes)))
        problem = f"no file ending with {' or '.join(suffixes)}"
    else:
        names = sorted(map(pathlib.Path, glob.glob(path, recursive=True)))
        problem = "no such file or folder"
    found = [name for name in names if name.is_file()]
    if not found:
        raise ConfigError(
            f"config.data.path={path!r}: {problem}; give a file, a folder or a pattern such as "
            f"'folder/*{suffixes[0]}'"
        )
    return found


def cache_folder(path: str, files: Sequence[pathlib.Path]) -> pathlib.Path:
    """Folder of the index of `path`: beside the files, named after the file or pattern."""
    if os.path.isdir(path):
        return pathlib.Path(path) / CACHE
    parent = os.path.commonpath([file.absolute().parent for file in files])
    return pathlib.Path(parent) / CACHE / re.sub(r"[^\w.-]+", "_", os.path.basename(path))


def names(files: Sequence[pathlib.Path]) -> list[str]:
    """A unique name for each file, the same wherever the data set is.

    Its base name if these are unique, else its path below the folder that holds all files.
    """
    short = [file.name for file in files]
    if len(set(short)) == len(short):
        return short
    paths = [file.absolute() for file in files]
    root = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(root).as_posix() for path in paths]


def stats(files: Sequence[pathlib.Path]) -> list[tuple[str, int, int | str]]:
    """Name, size and modification time of each file; the index is rebuilt when they change.

    Of objects in a bucket: name, 0 and tag (`mirrors.tags`).
    """
    tags = mirrors.tags(files)
    if tags is not None:
        return [(name, 0, tag) for name, tag in zip(names(files), tags, strict=True)]
    status = [file.stat() for file in files]
    return [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names(files), status, strict=True)]


class Files:
    """Reads byte ranges of files; thread-safe. Keeps the last used ones open.

    An object in a bucket is read by ranges. `local` copies it whole, once, for a pass over it.
    """

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self.paths = list(paths)
        self._open: collections.OrderedDict[int, _Descriptor] = collections.OrderedDict()
        self._lock = threading.Lock()
        remote = bool(paths) and mirrors.origin(self.paths[0]) is not None
        self._addresses = [mirrors.origin(path) for path in paths] if remote else []
        self._tags = mirrors.tags(self.paths) or []
        self._copies: collections.OrderedDict[int, pathlib.Path] = collections.OrderedDict()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def local(self, number: int) -> pathlib.Path:
        """A local file with the content of file `number`; the last `MAX_COPIES` copies exist.

        Raises:
          ImageError: the object changed since it was listed.
          BucketError: it cannot be read.
        """
        if not self._addresses:
            return self.paths[number]
        with self._lock:
            if number in self._copies:
                self._copies.move_to_end(number)
                return self._copies[number]
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="imagen_")
            while len(self._copies) >= MAX_COPIES:
                old, path = self._copies.popitem(last=False)
                self._open.pop(old, None)
                path.unlink()
            copy = pathlib.Path(self._folder.name) / str(number) / self.paths[number].name
            copy.parent.mkdir(exist_ok=True)
            found = buckets.read(str(self._addresses[number]))
            self._check(number, found.tag)
            copy.write_bytes(found.data)
            self._copies[number] = copy
            return copy

    def read_start(self, location: tuple[int, int, int], count: int) -> tuple[bytes, int]:
        """At most `count` first bytes of a file number, offset and size; and the size."""
        number, offset, size = location
        return self.read(number, offset, min(size, count)), size

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Reads `size` bytes of file `number` at `offset`.

        Raises:
          ImageError: it is shorter, or the object changed since it was listed.
          OSError: it cannot be read.
        """
        if self._addresses and number not in self._copies:
            try:
                found = buckets.read(str(self._addresses[number]), offset, size)
            except buckets.MissingError:
                raise ImageError(f"missing object ({self._addresses[number]})") from None
            self._check(number, found.tag)
            return found.data
        descriptor = self._descriptor(number)
        try:
            data = os.pread(descriptor.number, size, offset)
            while len(data) < size:  # A call reads at most 2 GiB.
                more = os.pread(descriptor.number, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError:
            with self._lock:  # Opened again by the next read.
                self._open.pop(number, None)
            raise
        if len(data) != size:
            raise ImageError(f"unreadable ({self.paths[number].name} has become shorter)")
        return data

    def _check(self, number: int, tag: str) -> None:
        if tag != self._tags[number]:
            address = self._addresses[number]
            raise ImageError(f"changed since the index was made ({address}; run `imagen prepare`)")

    def _descriptor(self, number: int) -> _Descriptor:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        # Not under the lock: a store may take long to open a file.
        descriptor = _Descriptor(self._copies.get(number, self.paths[number]))
        with self._lock:
            descriptor = self._open.setdefault(number, descriptor)
            while len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
        return descriptor


class _Descriptor:
    """An open file; closed when the last read that uses it ends."""

    def __init__(self, path: pathlib.Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # `os` may be gone at the end of the interpreter.
        if hasattr(self, "number"):
            close(self.number)
