"""Tensors from torch's pickles, without torch and without executing the pickle.

A pickle can call any importable function. This reader allows the four names that a saved
`state_dict` of tensors uses and rejects all others. It reads both containers, the zip archive of
torch 1.6 and later and the older stream of pickles, one tensor at a time.

Memory is bounded by the file's size: every instruction of a pickle is checked before it runs
(`_checked`), a tensor has no more elements than its storage, and a storage is not compressed.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
import zlib
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

MAX_PICKLE_BYTES = 64 << 20  # Names and shapes; the pickle of a T5-XXL has some hundred kilobytes.
MAX_RANK = 32
# Instructions that a `state_dict` needs. Missing are those that import by a stack value, build
# objects of extensions, or refer to buffers outside the pickle.
_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE"),
        *("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2"),
        *("LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE"),
        *("TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID", "PERSID"),
    }
)

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
    zlib.error,
    struct.error,
    ArithmeticError,
    RuntimeError,  # An encrypted member of an archive; a recursion.
    NotImplementedError,
    MemoryError,
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
    """A flat buffer of `count` elements in the file; `read` is set once its offset is known."""

    def __init__(self, dtype: np.dtype, count: int, read: Callable[[], bytes] = bytes):
        self.dtype = dtype
        self.count = count
        self.read = read


def _tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> Tensor:
    """Stands in for torch._utils._rebuild_tensor_v2.

    `np.ndarray` checks that the strides stay within the buffer.
    """
    item, numbers = storage.dtype.itemsize, (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        raise ValueError(f"a tensor of shape {shape[:MAX_RANK]} has {len(strides)} strides")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("a tensor has an offset, shape or stride that is no number of elements")
    if math.prod(shape) > storage.count:
        raise ValueError(f"a tensor of shape {shape} has a storage of {storage.count} elements")

    def read() -> np.ndarray:
        steps, data = tuple(step * item for step in strides), storage.read()
        # The pickle's own number of elements may be a lie.
        if math.prod(shape) * item > len(data):
            raise ValueError(f"a tensor of shape {shape} has a storage of {len(data)} bytes")
        return np.ndarray(shape, storage.dtype, data, offset * item, steps)

    return Tensor(tuple(shape), read)


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Allows tensors, their storages and ordered dicts; rejects every other name."""

    def __init__(self, file: io.BufferedIOBase, storage: Callable[[np.dtype, str, int], _Storage]):
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
        kind, name, key, _, count, *view = pid
        if type(count) is not int or count < 0:
            raise RefusedError("it refers to a storage without a number of elements")
        if kind != "storage" or name not in _STORAGES or any(v is not None for v in view):
            raise RefusedError("it refers to something that is not a plain storage")
        return self._storage(_STORAGES[name], str(key), count)


def _checked(file: io.BufferedIOBase) -> io.BytesIO:
    """The pickle at the position of a file, which is then behind it; every instruction is checked.

    The unpickler believes a pickle: it allocates a memo of any index that is named.

    Raises:
      RefusedError: an instruction that tensors do not need, or more than MAX_PICKLE_BYTES.
    """
    start, content = file.tell(), io.BytesIO(file.read(MAX_PICKLE_BYTES))
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name not in _OPCODES:
            raise RefusedError(
                f"its pickle has the instruction {opcode.name}; only tensors are read"
            )
        if (
            opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            and not 0 <= int(argument or 0) <= 2 * count + 2
        ):
            raise RefusedError(f"its pickle has a memo of index {argument}")
    end = content.tell()
    file.seek(start + end)
    return io.BytesIO(content.getvalue()[:end])


def _open_zip(path: pathlib.Path) -> Any:
    archive = zipfile.ZipFile(path)
    root = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
    if root is None:
        raise ValueError("the archive has no data.pkl")
    root = root.removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in archive.namelist() and _member(archive, order, path) != b"little":
        raise ValueError("it was written on a big-endian machine")

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        return _Storage(dtype, count, lambda: _member(archive, f"{root}data/{key}", path))

    return _Unpickler(
        _checked(io.BytesIO(_member(archive, f"{root}data.pkl", path))), storage
    ).load()


def _member(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> bytes:
    """A member of the archive; torch does not compress them, so none is larger than the file."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
        raise RefusedError(f"its member {name} is compressed; torch stores members as they are")
    return archive.read(info)


def _open_stream(path: pathlib.Path) -> Any:
    """The format before torch 1.6: five pickles, then the storages' bytes in key order."""
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, count))

    with open(path, "rb") as file:
        magic, protocol, _, tensors, keys = (
            _Unpickler(_checked(file), storage).load() for _ in range(5)
        )
        if magic != _STREAM_MAGIC or protocol != 1001:
            raise ValueError("neither torch's zip archive nor its older stream of pickles")
        for key in keys:
            (count,) = struct.unpack("<q", file.read(8))
            size = count * storages[key].dtype.itemsize
            if not 0 <= size <= path.stat().st_size:
                raise EOFError("it is truncated")
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
