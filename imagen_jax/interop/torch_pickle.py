"""Tensors from torch's pickles, without torch and without executing the pickle.

A pickle can call any importable function. This reader allows the four names that a saved
`state_dict` of tensors uses and rejects all others. It reads both containers, the zip archive of
torch 1.6 and later and the older stream of pickles, one tensor at a time.
"""

from __future__ import annotations

import collections
import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.dtype("f8"),
    "FloatStorage": np.dtype("f4"),
    "HalfStorage": np.dtype("f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("i8"),
    "IntStorage": np.dtype("i4"),
    "ShortStorage": np.dtype("i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C


class RefusedError(pickle.UnpicklingError):
    """The pickle refers to something that is not a tensor."""


# Exceptions that a damaged file may raise.
ERRORS = (
    pickle.UnpicklingError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    EOFError,
    zipfile.BadZipFile,
    struct.error,
)


class Tensor(NamedTuple):
    """A tensor in a file: its shape, and a function that reads its values."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_tensors(path: pathlib.Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a saved `state_dict` whose names `keep` accepts; values are not read.

    Raises:
      RefusedError: the file contains anything but tensors.
      Exception: one of `ERRORS`, if the file is damaged; also raised by `Tensor.read`.
    """
    tensors = _open_zip(path) if zipfile.is_zipfile(path) else _open_stream(path)
    if not isinstance(tensors, dict):
        raise ValueError(f"it contains a {type(tensors).__name__}, not a dict of tensors")
    tensors = tensors.get("state_dict", tensors)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and keep(name)
    }


class _Storage:
    """A flat buffer in the file; `read` is set once its offset is known."""

    def __init__(self, dtype: np.dtype, read: Callable[[], bytes] = bytes):
        self.dtype = dtype
        self.read = read


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> Tensor:
    """Stands in for torch._utils._rebuild_tensor_v2.

    `np.ndarray` checks that the strides stay within the buffer.
    """
    item = storage.dtype.itemsize

    def read() -> np.ndarray:
        steps = tuple(step * item for step in strides)
        return np.ndarray(shape, storage.dtype, storage.read(), offset * item, steps)

    return Tensor(tuple(shape), read)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Allows tensors, their storages and ordered dicts; rejects every other name."""

    def __init__(self, file: io.BufferedIOBase, storage: Callable[[np.dtype, str], _Storage]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _STORAGES:
            # A string: the rest of the pickle cannot modify it.
            return name
        raise RefusedError(f"it refers to {module}.{name}; only tensors are read")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, name, key, _, _, *view = pid
        if kind != "storage" or name not in _STORAGES or any(v is not None for v in view):
            raise RefusedError("it refers to something that is not a plain storage")
        return self._storage(_STORAGES[name], str(key))


def _open_zip(path: pathlib.Path) -> Any:
    archive = zipfile.ZipFile(path)
    root = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
    if root is None:
        raise ValueError("the archive has no data.pkl")
    root = root.removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")

    def storage(dtype: np.dtype, key: str) -> _Storage:
        return _Storage(dtype, lambda: archive.read(f"{root}data/{key}"))

    return _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage).load()


def _open_stream(path: pathlib.Path) -> Any:
    """The format before torch 1.6: five pickles, then the storages' bytes in key order."""
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str) -> _Storage:
        return storages.setdefault(key, _Storage(dtype))

    with open(path, "rb") as file:
        magic, protocol, _, tensors, keys = (_Unpickler(file, storage).load() for _ in range(5))
        if magic != _STREAM_MAGIC or protocol != 1001:
            raise ValueError("neither torch's zip archive nor its older stream of pickles")
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            size = count * storages[key].dtype.itemsize
            storages[key].read = _part_of(path, file.tell(), size)
            file.seek(size, os.SEEK_CUR)
        if file.tell() > path.stat().st_size:
            raise EOFError("it is truncated")
    return tensors


def _part_of(path: pathlib.Path, start: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    return read
