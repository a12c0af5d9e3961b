"""Weight files: safetensors (by the `safetensors` package) and torch pickles (without torch).

Tensors are selected by name; others are not read, so the encoder of a 45 GB encoder-decoder costs
only its own size. `open_folder` reads no tensor before `Tensor.read`, so a model can be placed on a
mesh without being whole in host memory. The other modules of this package map foreign names and
layouts; `check_parameters` compares them with what a network expects.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from imagen_jax.interop import torch_pickle
from imagen_jax.interop.torch_pickle import Tensor
from imagen_jax.io import atomic

# Weights of a Hugging Face model, in order of preference; each whole or sharded.
MODEL_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
)
# dtypes of safetensors.
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


class WeightsError(ValueError):
    """A weight file is missing, damaged or of another network; the message is one line."""


def read_safetensors(
    path: str | pathlib.Path, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """Maps the tensors whose name `keep` accepts.

    Args:
      path: a `.safetensors` file.
      keep: which names to map.

    Returns:
      Read-only arrays by name, mapped from the file: values are read when they are accessed.

    Raises:
      WeightsError: the file is damaged or truncated.
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
    """As `read_safetensors`, but `Tensor.read` copies a tensor into its own memory."""
    path = pathlib.Path(path)

    def tensor(start: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        read = lambda: np.fromfile(path, np.uint8, size, offset=start)  # noqa: E731
        return Tensor(shape, lambda: read().view(dtype).reshape(shape))

    return {name: tensor(*entry) for name, entry in _entries(path, keep).items()}


def _entries(
    path: pathlib.Path, keep: Callable[[str], bool]
) -> dict[str, tuple[int, np.dtype, tuple[int, ...]]]:
    """First byte in the file, dtype and shape of each tensor that `keep` accepts.

    `safe_open` parses the header and checks that the tensors fill the rest of the file without
    gaps, so the offsets follow from the sizes in file order.

    Raises:
      WeightsError: the file is damaged, or a tensor has an unknown dtype.
    """
    sizes: dict[str, int] = {}
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.offset_keys():
                view = file.get_slice(name)
                dtype, shape = view.get_dtype(), tuple(view.get_shape())
                found[name] = dtype, shape
                if dtype not in _DTYPES:
                    raise WeightsError(
                        f"{path}: tensor {name!r} has dtype {dtype}, expected one of "
                        f"{', '.join(_DTYPES)}"
                    )
                sizes[name] = math.prod(shape) * _DTYPES[dtype].itemsize
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from error
    start, entries = path.stat().st_size - sum(sizes.values()), {}
    for name, (dtype, shape) in found.items():
        if keep(name):
            entries[name] = start, _DTYPES[dtype], shape
        start += sizes[name]
    return entries


def write_safetensors(path: str | pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays atomically; equal arrays give equal bytes.

    Args:
      path: file to write.
      arrays: NumPy (or host) arrays by name.
    """
    ordered = {
        name: np.ascontiguousarray(arrays[name]).reshape(np.shape(arrays[name]))
        for name in sorted(arrays)
    }
    # A temporary file: the arrays may be mapped from the file that is replaced.
    with atomic.file(path) as temporary:
        safetensors.numpy.save_file(ordered, temporary, metadata={"format": "pt"})


def read_torch(
    path: str | pathlib.Path, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """Reads a `state_dict` saved by `torch.save`, in the zip or the older stream format.

    Args:
      path: a `.bin`, `.pt` or `.pth` file.
      keep: which names to return.

    Raises:
      WeightsError: the file is damaged, or contains anything but tensors.
    """
    tensors = open_torch(path, keep)
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def open_torch(
    path: str | pathlib.Path, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """As `read_torch`, but each tensor is read by `Tensor.read`."""
    path = pathlib.Path(path)

    def guarded(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except torch_pickle.RefusedError as error:
            raise WeightsError(f"{path} is rejected: {error}") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # An offset before the start of the file.
                raise
            raise WeightsError(f"{path} is not a whole torch file: {error}") from error
        except torch_pickle.ERRORS as error:
            raise WeightsError(f"{path} is not a whole torch file of tensors: {error}") from error

    tensors = guarded(lambda: torch_pickle.open_tensors(path, keep))
    return {
        name: Tensor(tensor.shape, functools.partial(guarded, tensor.read))
        for name, tensor in tensors.items()
    }


def read_folder(
    folder: str | pathlib.Path,
    names: Iterable[str] = MODEL_FILES,
    keep: Callable[[str], bool] = lambda name: True,
) -> dict[str, np.ndarray]:
    """The values of `open_folder`. Raises WeightsError."""
    tensors = open_folder(folder, names, keep)
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def open_folder(
    folder: str | pathlib.Path,
    names: Iterable[str] = MODEL_FILES,
    keep: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Opens the first of `names` that exists in the folder, whole or sharded.

    The index of the shards of `a.safetensors` is `a.safetensors.index.json`, that of
    `a.fp16.safetensors` is `a.safetensors.index.fp16.json`.

    Args:
      folder: a Hugging Face model folder.
      names: file names in order of preference.
      keep: which tensors to open.

    Raises:
      WeightsError: none of the files exists, a shard is missing, or a file is damaged.
    """
    folder = pathlib.Path(folder)
    for name in names:
        index = folder / f"{name}.index.json"
        if ".fp16." in name:
            index = folder / f"{name.replace('.fp16.', '.')}.index.fp16.json"
        if (folder / name).is_file():
            return _open_file(folder / name, keep)
        if index.is_file():
            return _open_shards(index, keep)
    raise WeightsError(f"{folder} has none of {', '.join(names)} (or a sharded .index.json of it)")


def _open_file(path: pathlib.Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    return (open_safetensors if path.suffix == ".safetensors" else open_torch)(path, keep)


def _open_shards(index: pathlib.Path, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted({path for name, path in shards_of(index).items() if keep(name)}):
        tensors |= _open_file(path, keep)
    return tensors


def shards_of(index: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each tensor of an index of shards. Raises WeightsError."""
    try:
        files = dict(json.loads(index.read_text())["weight_map"])
        # File name only: an index must not refer to files outside its folder.
        paths = {name: index.parent / pathlib.PurePath(file).name for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index} is not an index of weight shards: {error}") from error
    for path in set(paths.values()):
        if not path.is_file():
            raise WeightsError(f"{index} names the shard {path.name}, which is missing")
    return paths


def read_config(path: pathlib.Path, kind: str) -> dict[str, Any]:
    """The config.json of a foreign model.

    Args:
      path: the file.
      kind: description of its folder for messages.

    Raises:
      WeightsError: it is missing, or not a JSON object.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing; {kind} has one")
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
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
    """Converts foreign tensors to float32 parameters.

    Args:
      source: file or folder, for messages.
      found: foreign name -> tensor.
      expected: parameter path -> foreign name and shape.
      convert: (parameter path, foreign values) -> values.
      unread: names and shapes of tensors that must exist and are not used.

    Returns:
      Parameter path -> values, and the SHA-256 of all paths and values.

    Raises:
      WeightsError: as `check_parameters`.
    """
    shapes = {name: tensor.shape for name, tensor in found.items()}
    check_parameters(source, shapes, {**dict(expected.values()), **(unread or {})})
    digest, flat = hashlib.sha256(), {}
    for path, (name, _) in sorted(expected.items()):
        values = np.asarray(found[name].read()).astype(np.float32)
        flat[path] = np.ascontiguousarray(convert(path, values))
        digest.update(path.encode())
        digest.update(flat[path].data)
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
        raise WeightsError(f"{source} does not match its configuration; {'; '.join(parts)}")
