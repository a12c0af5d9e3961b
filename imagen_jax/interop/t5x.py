"""The public t5x checkpoints: a msgpack tree whose large leaves are zarr folders.

`checkpoint_N/checkpoint` maps names to arrays or to tensorstore descriptions of arrays in folders
`target.encoder.layers_0...` beside it. Only the encoder is read. Names and shapes are those of
`models.t5`; nothing is transposed.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import tensorstore as ts

from imagen_jax.config.text import T5Config
from imagen_jax.interop import weights
from imagen_jax.io import buckets
from imagen_jax.models import t5


def load(folder: str | pathlib.Path, t5_config: T5Config) -> tuple[T5Config, dict[str, Any]]:
    """Reads the encoder of a t5x checkpoint.

    Args:
      folder: a `checkpoint_N` folder, local or at an address that tensorstore reads (`gs://...`).
      t5_config: shape of the encoder; the checkpoint does not record it.

    Returns:
      `t5_config`, and float32 parameters as nested dicts of NumPy arrays (bfloat16 is widened).

    Raises:
      WeightsError: the folder is not a t5x checkpoint, is damaged or incomplete, or its parameters
        do not match `t5_config` (every missing, extra and wrong-shape one is named).
    """
    tensors = open_tensors(folder, t5_config)
    flat = {path: tensor.read() for path, tensor in tensors.items()}
    return t5_config, weights.unflatten(flat)


def open_tensors(folder: str | pathlib.Path, t5_config: T5Config) -> dict[str, weights.Tensor]:
    """As `load`, by path (`layers_0/mlp/wo/kernel`); each tensor is read by `Tensor.read`."""
    store = open_store(str(folder))
    leaves = _encoder_leaves(_read_tree(store, folder), folder)
    expected = weights.flatten(t5.parameter_shapes(t5_config))
    found = {path: _leaf_array(store, folder, path, leaf) for path, leaf in leaves.items()}
    weights.check_parameters(
        folder,
        {path: array.shape for path, array in found.items() if array is not None},
        {path: leaf.shape for path, leaf in expected.items()},
    )
    return {
        path: weights.Tensor(tuple(array.shape), functools.partial(_read, array, folder, path))
        for path, array in found.items()
    }


def read_file(address: str) -> bytes | None:
    """Content of a file, local or at an address that tensorstore reads; None if it is missing."""
    if "://" not in address:
        path = pathlib.Path(address)
        return path.read_bytes() if path.is_file() else None
    if buckets.is_address(address):
        try:
            return buckets.read(address).data
        except buckets.MissingError:
            return None
        except buckets.BucketError as error:
            raise weights.WeightsError(str(error)) from error
    folder, _, name = address.rpartition("/")
    return _read_key(open_store(folder), folder, name)


def open_store(folder: str) -> ts.KvStore:
    """The files of a folder. Raises WeightsError for an address that tensorstore cannot open."""
    if "://" not in folder:
        path = f"{pathlib.Path(folder).absolute()}/"
        return ts.KvStore.open({"driver": "file", "path": path}).result()
    try:
        if buckets.is_address(folder):
            return buckets.kvstore(folder)
        address = folder.rstrip("/") + "/"
        return ts.KvStore.open(address, context=buckets.patience()).result()
    except ValueError as error:
        raise weights.WeightsError(f"{folder} cannot be opened: {_first_line(error)}") from error


def _read_key(store: ts.KvStore, folder: Any, name: str) -> bytes | None:
    try:
        content = store.read(name).result()
    except (ValueError, OSError) as error:
        raise weights.WeightsError(f"{folder}/{name}: {_first_line(error)}") from error
    return content.value if content.state == "value" else None


def _read_tree(store: ts.KvStore, folder: Any) -> Mapping[str, Any]:
    """The parameter tree of the msgpack file."""
    content = _read_key(store, folder, "checkpoint")
    if content is None:
        raise weights.WeightsError(
            f"{folder} has no file 'checkpoint'; give a t5x checkpoint_N folder"
        )
    try:
        tree = msgpack.unpackb(content, ext_hook=_array, raw=False, strict_map_key=False)
        return tree["optimizer"]["target"]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise weights.WeightsError(
            f"{folder}/checkpoint is not a whole t5x checkpoint: {type(error).__name__} {error}"
        ) from error


def _array(code: int, data: bytes) -> np.ndarray:
    """Flax's msgpack extensions: 1 is an array, 3 a scalar, both as (shape, dtype, bytes)."""
    if code not in (1, 3):
        raise ValueError(f"msgpack extension {code} is not an array")
    shape, dtype, content = msgpack.unpackb(data, raw=True)
    name = dtype.decode()
    return np.frombuffer(content, ml_dtypes.bfloat16 if name == "bfloat16" else name).reshape(shape)


def _encoder_leaves(target: Mapping[str, Any], folder: Any) -> dict[str, Any]:
    """Parameter path -> inline array or tensorstore description, encoder only.

    Raises:
      WeightsError: the layout is umT5's.
    """
    encoder = target.get("encoder", {})
    if "encoder" in encoder:
        raise weights.WeightsError(
            f"{folder} is a umT5 or scanned T5 with layers stacked in one array "
            "(target.encoder.encoder); only T5 v1.0, v1.1 and ByT5 with separate layers are read"
        )
    leaves = _flatten({**encoder, "token_embedder": target.get("token_embedder", {})})
    if any(re.match(r"layers_\d+/.*rel_embedding", path) for path in leaves):
        raise weights.WeightsError(
            f"{folder} is a umT5 with a relative bias per layer (layers_N.relpos_bias); only T5 "
            "v1.0, v1.1 and ByT5 with one relative bias are read"
        )
    return leaves


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """As `weights.flatten`, but a tensorstore description is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping) and "driver" not in value
        flat |= _flatten(value, f"{prefix}{name}/") if inner else {f"{prefix}{name}": value}
    return flat


def _leaf_array(store: ts.KvStore, folder: Any, path: str, leaf: Any) -> Any:
    """An inline array, or an opened zarr array; None if its folder is missing."""
    if not isinstance(leaf, Mapping):
        return leaf
    # The recorded address is that of the machine that wrote it; the key is the folder's name.
    root = "" if path.startswith("token_embedder") else "encoder."
    name = f"target.{root}{path.replace('/', '.')}/"
    if _read_key(store, folder, f"{name}.zarray") is None:
        return None
    # A missing chunk is an error, not zeros.
    spec = {"driver": "zarr", "kvstore": (store / name).spec(), "fill_missing_data_reads": False}
    try:
        return ts.open(spec, context=buckets.patience(), open=True, read=True).result()
    except ValueError as error:
        raise weights.WeightsError(f"{folder}/{name} is damaged: {_first_line(error)}") from error


def _read(array: Any, folder: Any, path: str) -> np.ndarray:
    try:
        values = array.read().result() if isinstance(array, ts.TensorStore) else array
    except ValueError as error:
        raise weights.WeightsError(
            f"{folder}: {path} is damaged or incomplete: {_first_line(error)}"
        ) from error
    return np.asarray(values).astype(np.float32)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
