"""The files of a source that has several, and reading a piece out of one of them."""

from __future__ import annotations

import glob
import os
import pathlib
import re
import threading
from collections.abc import Sequence

from imagen_jax.config.fields import ConfigError
from imagen_jax.io.images import ImageError

CACHE = ".imagen_index"  # Folder of an index, beside the data.
MAX_OPEN_FILES = 512  # Files; common limits on open files begin at 1024.


def find(path: str, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """The files that `config.data.path` names, sorted.

    Args:
      path: a file, a folder or a pattern with *, ? or [].
      suffixes: what file names in a folder end with.

    Raises:
      ConfigError: there are none.
    """
    if os.path.isfile(path):
        return [pathlib.Path(path)]
    if os.path.isdir(path):
        names = sorted(p for p in pathlib.Path(path).rglob("*") if p.name.endswith(tuple(suffixes)))
        wanted = f"no file ending with {' or '.join(suffixes)}"
    else:
        names = sorted(map(pathlib.Path, glob.glob(path, recursive=True)))
        wanted = "no such file or folder"
    found = [name for name in names if name.is_file()]
    if not found:
        raise ConfigError(
            f"config.data.path={path!r}: {wanted}; give a file, a folder or a pattern such as "
            f"'folder/*{suffixes[0]}'"
        )
    return found


def cache_folder(path: str, files: Sequence[pathlib.Path]) -> pathlib.Path:
    """Where the index of the files of `path` belongs: beside them, by the name of the pattern."""
    if os.path.isdir(path):
        return pathlib.Path(path) / CACHE
    parent = os.path.commonpath([file.absolute().parent for file in files])
    return pathlib.Path(parent) / CACHE / re.sub(r"[^\w.-]+", "_", os.path.basename(path))


def names(files: Sequence[pathlib.Path]) -> list[str]:
    """A name for each file that tells it from the others, short where that is enough."""
    short = [file.name for file in files]
    return short if len(set(short)) == len(short) else [file.as_posix() for file in files]


def stats(files: Sequence[pathlib.Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file: when these differ, the index is made anew."""
    status = [file.stat() for file in files]
    return [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names(files), status, strict=True)]


class Files:
    """Reads pieces of files, from several threads at once."""

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self.paths = list(paths)
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """`size` bytes of file `number` from `offset` on. Raises ImageError if there are less."""
        if len(self.paths) <= MAX_OPEN_FILES:
            with self._lock:
                if number not in self._open:
                    self._open[number] = os.open(self.paths[number], os.O_RDONLY)
            data = os.pread(self._open[number], size, offset)
        else:
            with self.paths[number].open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise ImageError(f"unreadable ({self.paths[number].name} has become shorter)")
        return data
