"""Atomic writes: a result is complete or absent, and the previous one stays until then.

Everything is written to a hidden temporary name in the same folder and renamed. A temporary name
holds host name, process id and a random part, so that several writers of one path do not collide;
the last one to finish wins. Readers list no hidden names, so the leftovers of a killed writer are
not taken for results.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import pathlib
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from imagen_jax.io import paths

STALE_AFTER = 3600.0  # Seconds without a write, after which a temporary folder's writer is dead.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Of <fcntl.h> and <linux/fs.h>.


class OutputError(ValueError):
    """An output path holds something of another kind; the message names it."""


@contextlib.contextmanager
def file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[pathlib.Path]:
    """A temporary name that replaces `path` when the context ends without an exception.

    Args:
      path: the file, local or known to etils.epath; missing parent folders are created.
      durable: flush to the disk before renaming; otherwise a power failure may leave an empty file
        of that name. False: for files that readers check themselves.
    """
    is_local = "://" not in os.fspath(path)
    # Both classes have the methods of pathlib.Path that are used here and by the callers.
    target: Any = pathlib.Path(path) if is_local else epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(temporary_name(target.name))
    try:
        yield temporary
        if durable and is_local:
            _flush(temporary)
        temporary.replace(target)
        if durable and is_local:
            _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, errors: str = "strict") -> None:
    """Writes a text file in UTF-8; `errors` as of `str.encode`."""
    with file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def folder(path: str | os.PathLike[str], *, replace: bool = True) -> Iterator[pathlib.Path]:
    """An empty temporary folder that becomes `path` when the context ends without an exception.

    On Linux the two folders are exchanged in one step. On file systems without that operation the
    old folder is renamed first; a process killed between the two renames leaves both, complete,
    under hidden names that end in .old and .tmp.

    Args:
      path: the folder; missing parents are created. A symbolic link is followed.
      replace: False: keep an existing folder with content, for example another writer's.
    """
    target = pathlib.Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    temporary = target.with_name(temporary_name(target.name))
    temporary.mkdir()
    try:
        yield temporary
        for found in [*temporary.rglob("*"), temporary]:
            _flush(found)
        _rename_folder(temporary, target, replace=replace)
        _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(name: str) -> str:
    """A hidden name for writing the file or folder `name`, different in every call."""
    return f".{_start(name)}.{socket.gethostname()[:64]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def check_replaceable(out: str, mark: str, kind: str) -> pathlib.Path:
    """Checks that an output folder is new, empty, or an earlier result of the same kind.

    Args:
      out: path given by the user.
      mark: a file that every folder of this kind holds.
      kind: for the message.

    Returns:
      The absolute path.

    Raises:
      OutputError: a file, or a folder that holds something else.
    """
    path = paths.local(out, "--out").absolute()
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not (path / mark).is_file():
        raise OutputError(f"--out={out} exists and is no {kind}; name a new one")
    return path


def _flush(path: pathlib.Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not implement it for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _rename_folder(temporary: pathlib.Path, target: pathlib.Path, *, replace: bool) -> None:
    """Gives a folder its final name; afterwards `temporary` is absent or the folder to remove."""
    renamed = []
    while True:
        try:
            os.rename(temporary, target)  # Succeeds where there is nothing, or an empty folder.
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not replace:
            break
        try:
            _exchange(temporary, target)
            break
        except FileNotFoundError:
            continue  # Another writer has just renamed the old one.
        except OSError:  # Not supported here.
            old = target.with_name(temporary_name(target.name)).with_suffix(".old")
            with contextlib.suppress(FileNotFoundError):
                os.rename(target, old)
                renamed.append(old)
    for old in renamed:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> None:
    """Exchanges two names in one step. Raises OSError where that is not supported."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    names = os.fsencode(one), os.fsencode(other)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def _remove_stale(target: pathlib.Path) -> None:
    """Removes temporary folders of `target` to which nothing was written for `STALE_AFTER`."""
    for found in target.parent.glob(f".{glob.escape(_start(target.name))}.*.tmp"):
        with contextlib.suppress(OSError):  # Its writer, or another one, may remove it meanwhile.
            newest = max(p.stat().st_mtime for p in [found, *found.rglob("*")])
            if found.is_dir() and time.time() - newest > STALE_AFTER:
                shutil.rmtree(found, ignore_errors=True)


def _start(name: str) -> str:
    """The part of a name that its temporary names keep: file systems allow 255 bytes."""
    return os.fsencode(name)[:120].decode("utf-8", "ignore")
