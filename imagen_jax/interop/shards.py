"""Safetensors in shards with an index, as Hugging Face's: written and read file by file."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagen_jax.interop.weights import (
    WeightsError,
    read_safetensors,
    shards_of,
    write_safetensors,
)
from imagen_jax.io import atomic


def write_shards(path: pathlib.Path, arrays: Mapping[str, Any], max_bytes: int) -> None:
    """Writes a safetensors file, or shards `NAME-00001-of-00002.safetensors` and their index.

    One shard at a time is in host memory. The index is that of Hugging Face, `PATH.index.json`.

    Args:
      path: the file, in a folder without files of its name.
      arrays: NumPy or JAX arrays by name.
      max_bytes: of a file, if it holds more than one array.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(arrays):
        if shards[-1] and size + arrays[name].nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += arrays[name].nbytes
    if len(shards) == 1:
        write_safetensors(path, {name: np.asarray(value) for name, value in arrays.items()})
        return
    files = {}
    for number, names in enumerate(shards, 1):
        file = f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}"
        write_safetensors(path.with_name(file), {name: np.asarray(arrays[name]) for name in names})
        files |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in arrays.values())},
        "weight_map": files,
    }
    atomic.write_json(index_of(path), index)


def index_of(path: pathlib.Path) -> pathlib.Path:
    """The index of a file that was written in shards."""
    return path.with_name(f"{path.name}.index.json")


def shard_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or the shards of its index. Raises WeightsError."""
    index = index_of(path)
    return [path] if path.is_file() else sorted(set(shards_of(index).values()))


def read_shards(path: pathlib.Path) -> dict[str, np.ndarray]:
    """As `read_safetensors`, of a file or of its shards. Raises WeightsError."""
    arrays: dict[str, np.ndarray] = {}
    for file in shard_files(path):
        arrays |= read_safetensors(file)
    if not path.is_file():
        expected = shards_of(index_of(path))
        differing = sorted(expected.keys() ^ arrays.keys())
        if differing:
            raise WeightsError(f"{index_of(path)} and its shards differ in {differing[0]}")
    return arrays
