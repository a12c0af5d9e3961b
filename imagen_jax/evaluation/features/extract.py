"""Features of many pictures, in parts on disk: what was computed once is not computed again.

A part is a batch: its features beside the hash of its pixels. Whoever comes again, after a kill or
with the same reference another day, reads the pictures, and computes only the parts whose pixels or
network have changed. Several processes share a folder: part k is process k mod N's, and all of them
read the whole at the end, so that no result depends on how many there were.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from imagen_jax.evaluation.features import frechet
from imagen_jax.evaluation.features.frechet import Statistics
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.io import atomic

PARTS_AT_ONCE = 128  # In memory for their sums; a merge costs as much as some hundred pictures.
THREADS = 8  # That decode and resize; Pillow and NumPy let go of the interpreter meanwhile.


class Network(NamedTuple):
    """What makes features of pictures.

    Attributes:
      fingerprint: of all that the features depend on but the pixels: weights, resizing.
      prepare: pixels of one picture -> the network's input, on the host.
      apply: (params, inputs) -> features; compiled once.
      params: the network's.
    """

    fingerprint: str
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, Array], Array]
    params: Any


class Pictures(NamedTuple):
    """Pictures by number.

    Attributes:
      count: how many.
      load: number -> pixels, from any thread.
    """

    count: int
    load: Callable[[int], UInt8[np.ndarray, "h w 3"]]


class Parts(NamedTuple):
    """Features of pictures, as they lie on disk.

    Attributes:
      files: one per batch, in order.
      sha256: of the pixels of all pictures.
      count: pictures.
    """

    files: tuple[pathlib.Path, ...]
    sha256: str
    count: int

    def features(self) -> Float[np.ndarray, "n d"]:
        """All of them, float32."""
        return _features(self.files)

    def statistics(self) -> Statistics:
        """Their sums, merged block by block: at no time are all features in memory."""
        starts = range(0, len(self.files), PARTS_AT_ONCE)
        blocks = (self.files[i : i + PARTS_AT_ONCE] for i in starts)
        return frechet.merged(Statistics.of(_features(block)) for block in blocks)


def extract(
    pictures: Pictures,
    network: Network,
    folder: str | os.PathLike[str],
    *,
    batch_size: int,
    log: Callable[[str], None] = print,
) -> Parts:
    """Features of all pictures, on all devices of this process.

    Args:
      pictures: what to look at.
      network: what looks.
      folder: for the parts; one that several processes share.
      batch_size: pictures at a time.
      log: receives progress lines.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, pictures.count, batch_size)
    files = tuple(folder / f"{start:07d}_{batch_size}.npz" for start in starts)
    own = range(jax.process_index(), len(files), jax.process_count())
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    params = jax.device_put(network.params, NamedSharding(mesh, PartitionSpec()))
    computed = 0
    with ThreadPoolExecutor(THREADS) as pool:

        def begin(k: int) -> list[Any]:
            stop = min(starts[k] + batch_size, pictures.count)
            return [pool.submit(_prepare, pictures, network, i) for i in range(starts[k], stop)]

        coming = begin(own[0]) if len(own) else []
        for number, k in enumerate(own, 1):
            prepared = [future.result() for future in coming]
            coming = begin(own[number]) if number < len(own) else []
            hashes = np.stack([sha256 for sha256, _ in prepared])
            if _holds(files[k], hashes, network.fingerprint):
                continue
            inputs = np.stack(list(pool.map(lambda entry: entry[1](), prepared)))
            features = _apply(network, params, inputs, batch_size, mesh)
            _write(files[k], features, hashes, network.fingerprint)
            computed += 1
            if computed == 1 or number % 20 == 0 or number == len(own):
                done = min(starts[k] + batch_size, pictures.count)
                log(f"features of {done}/{pictures.count} pictures")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"features in {folder}")
    for file in files:
        if not file.is_file():
            raise EvaluationError(f"{file} is missing; all processes must see the same folder")
    hashes = hashlib.sha256(b"".join(_read(file)[1].tobytes() for file in files))
    return Parts(files, hashes.hexdigest(), pictures.count)


def _prepare(
    pictures: Pictures, network: Network, number: int
) -> tuple[UInt8[np.ndarray, "32"], Callable[[], np.ndarray]]:
    """The hash of a picture, and what makes the input of it if that is needed."""
    pixels = np.ascontiguousarray(pictures.load(number))
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.data)
    return np.frombuffer(digest.digest(), np.uint8), lambda: network.prepare(pixels)


def _apply(
    network: Network, params: Any, inputs: np.ndarray, batch_size: int, mesh: Mesh
) -> Float[np.ndarray, "n d"]:
    """Features of a batch; it is filled up so that one shape is compiled and devices divide it."""
    devices = mesh.devices.size
    full = -(-batch_size // devices) * devices
    padded = np.concatenate([inputs, np.repeat(inputs[-1:], full - len(inputs), 0)])
    placed = jax.device_put(padded, NamedSharding(mesh, PartitionSpec("data")))
    # Tensor cores' 10-bit products would move every score.
    with jax.default_matmul_precision("highest"):
        return np.asarray(network.apply(params, placed))[: len(inputs)].astype(np.float32)


def _write(file: pathlib.Path, features: np.ndarray, hashes: np.ndarray, network: str) -> None:
    with atomic.file(file) as partial, partial.open("wb") as stream:
        np.savez(stream, features=features, hashes=hashes, network=network)


def _read(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Features, hashes of the pictures, fingerprint of the network."""
    with np.load(file, allow_pickle=False) as part:
        return part["features"], part["hashes"], str(part["network"])


def _features(files: Sequence[pathlib.Path]) -> Float[np.ndarray, "n d"]:
    return np.concatenate([_read(file)[0] for file in files])


def _holds(file: pathlib.Path, hashes: np.ndarray, network: str) -> bool:
    """Whether the file is whole and of these pictures and this network."""
    try:
        _, found, fingerprint = _read(file)
        return fingerprint == network and np.array_equal(found, hashes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
