"""Weight files on disk: safetensors, and torch's pickles read without torch or trust.

Every reader gives the tensors it was asked for by name and touches no others, so that the encoder
of a 45 GB encoder-decoder costs its own size only. `open_folder` reads none before it is told to:
thus a model goes onto a mesh without ever being whole in a host's memory. Foreign names and layouts
are the business of the modules beside this one, which also use `check_parameters` to say in one
line what a checkpoint lacks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from imagen_jax.interop import torch_pickle
from imagen_jax.interop.torch_pickle import Tensor
from imagen_jax.io import atomic

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# Above this a header is not a header; the same bound as the format's own library.
_MAX_HEADER_BYTES = 100_000_000


class WeightsError(ValueError):
    """A weight file is missing, damaged or does not fit; the message is one line."""


def read_safetensors(
    path: str | pathlib.Path, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """Reads the tensors whose name `keep` accepts.

    Args:
      path: a `.safetensors` file.
      keep: which names to read.

    Returns:
      Read-only arrays mapped from the file, by name.

    Raises:
      WeightsError: the file is damaged or cut short.
    """
    path = pathlib.Path(path)
    entries = _entries(path, keep)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return {
        name: data[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for name, (start, dtype, shape) in entries.items()
    }


def open_safetensors(
    path: str | pathlib.Path, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """As `read_safetensors`, but each tensor is read when asked, into memory of its own."""
    path = pathlib.Path(path)

    def tensor(start: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        read = lambda: np.fromfile(path, np.uint8, size, offset=start)  # noqa: E731
        return Tensor(shape, lambda: read().view(dtype).reshape(shape))

    return {name: tensor(*entry) for name, entry in _entries(path, keep).items()}


def _entries(
    path: pathlib.Path, keep: Callable[[str], bool]
) -> dict[str, tuple[int, np.dtype, tuple[int, ...]]]:
    """First byte in the file, dtype and shape of each tensor. Raises WeightsError."""
    try:
        length_of_file = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER_BYTES, length_of_file - 8):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        body = length_of_file - 8 - length
        expected = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if expected != body:
            raise ValueError(f"{body} bytes of tensors, the header promises {expected}")
        return {name: _entry(entry, 8 + length) for name, entry in header.items() if keep(name)}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error


def _entry(entry: Mapping[str, Any], body: int) -> tuple[int, np.dtype, tuple[int, ...]]:
    start, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if not 0 <= start <= end or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape {shape} does not fill bytes {start} to {end}")
    return body + start, dtype, shape


def write_safetensors(path: str | pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays in the order of their names; the same arrays give the same bytes.

    Args:
      path: file to write.
      arrays: NumPy (or host) arrays by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name]).reshape(np.shape(arrays[name]))
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        blobs.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Under another name first: the arrays may be mapped from the very file that is written.
    with atomic.file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for blob in blobs:
            file.write(blob.tobytes())


def read_torch(
    path: str | pathlib.Path, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """Reads a `state_dict` saved by `torch.save`, in the zip or the older stream format.

    Args:
      path: a `.bin`, `.pt` or `.pth` file.
      keep: which names to return.

    Raises:
      WeightsError: the file is damaged, or asks for anything but tensors.
    """
    tensors = open_torch(path, keep)
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def open_torch(
    path: str | pathlib.Path, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """As `read_torch`, but each tensor is read when asked."""
    path = pathlib.Path(path)

    def guarded(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except torch_pickle.RefusedError as error:
            raise WeightsError(f"{path} is refused: {error}") from error
        except torch_pickle.ERRORS as error:
            raise WeightsError(f"{path} is not a whole torch file of tensors: {error}") from error

    tensors = guarded(lambda: torch_pickle.open_tensors(path, keep))
    return {
        name: Tensor(tensor.shape, functools.partial(guarded, tensor.read))
        for name, tensor in tensors.items()
    }


def read_folder(
    folder: str | pathlib.Path,
    names: Iterable[str] = ("model.safetensors", "pytorch_model.bin"),
    keep: Callable[[str], bool] = lambda name: True,
) -> dict[str, np.ndarray]:
    """The values of `open_folder`. Raises WeightsError."""
    tensors = open_folder(folder, names, keep)
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def open_folder(
    folder: str | pathlib.Path,
    names: Iterable[str] = ("model.safetensors", "pytorch_model.bin"),
    keep: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Opens the first of `names` that the folder has, whole or sharded (`NAME.index.json`).

    Args:
      folder: a Hugging Face model folder.
      names: file names in order of preference.
      keep: which tensors to open.

    Raises:
      WeightsError: none of the files is there, a shard is missing, or a file is damaged.
    """
    folder = pathlib.Path(folder)
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _open_file(folder / name, keep)
        if index.is_file():
            return _open_shards(index, keep)
    raise WeightsError(f"{folder} has none of {', '.join(names)} (or a sharded .index.json of it)")


def _open_file(path: pathlib.Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    return (open_safetensors if path.suffix == ".safetensors" else open_torch)(path, keep)


def _open_shards(index: pathlib.Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        files = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} is not an index of weight shards: {error}") from error
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for name, file in files.items() if keep(name)}):
        # Only the name: an index must not point outside its folder.
        path = index.parent / pathlib.PurePath(file).name
        if not path.is_file():
            raise WeightsError(f"{index} names the shard {path.name}, which is missing")
        tensors |= _open_file(path, keep)
    return tensors


def read_config(path: pathlib.Path, kind: str) -> dict[str, Any]:
    """The config.json of a foreign model; `kind` says in messages of what folder it is.

    Raises:
      WeightsError: it is missing, or no JSON object.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing; {kind} has one")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} is not a JSON object: {error}") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` as `{"a/b": x}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def read_as(
    source: str | pathlib.Path,
    found: Mapping[str, Tensor],
    expected: Mapping[str, tuple[str, tuple[int, ...]]],
    convert: Callable[[str, np.ndarray], np.ndarray],
    unread: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, np.ndarray], str]:
    """Foreign tensors as our float32 parameters.

    Args:
      source: file or folder, for messages.
      found: their name -> tensor.
      expected: our path -> their name and shape.
      convert: (our path, their values) -> our values.
      unread: names and shapes that must be there and are not used.

    Returns:
      Our path -> values, and the SHA-256 of all paths and values.

    Raises:
      WeightsError: as `check_parameters`.
    """
    shapes = {name: tensor.shape for name, tensor in found.items()}
    check_parameters(source, shapes, {**dict(expected.values()), **(unread or {})})
    digest, flat = hashlib.sha256(), {}
    for ours, (theirs, _) in sorted(expected.items()):
        values = np.asarray(found[theirs].read()).astype(np.float32)
        flat[ours] = np.ascontiguousarray(convert(ours, values))
        digest.update(ours.encode())
        digest.update(flat[ours].data)
    return flat, digest.hexdigest()


def check_parameters(
    source: str | pathlib.Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Compares shapes by name.

    Raises:
      WeightsError: names every missing, extra and wrong-shape parameter.
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} is {tuple(found[name])}, expected {tuple(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    parts = [
        f"{label}: {', '.join(names)}"
        for label, names in (("missing", missing), ("extra", extra), ("wrong shape", wrong))
        if names
    ]
    if parts:
        raise WeightsError(f"{source} does not fit its configuration; {'; '.join(parts)}")
