"""Feature extraction with a cache on disk.

A part is one batch: its features and the hashes of its pixels. A later call reads all images and
computes only the parts whose pixels or network changed, so an interrupted run resumes and a
reference is computed once. Several processes share a folder: process k mod N computes part k, and
every process reads all parts at the end, so the result does not depend on N.
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

PARTS_AT_ONCE = 128  # Parts in memory; merging statistics costs as much as some hundred images.
THREADS = 8  # For decoding and resizing; Pillow and NumPy release the interpreter lock.


class Network(NamedTuple):
    """A feature network with its preprocessing.

    Attributes:
      fingerprint: of everything but the pixels that determines the features: weights, resizing.
      prepare: pixels of one image -> network input, on the host.
      apply: (params, inputs) -> features; compiled once.
      params: parameters of the network.
    """

    fingerprint: str
    prepare: Callable[[np.ndarray], np.ndarray]
    apply: Callable[[Any, Array], Array]
    params: Any


class LazyImages(NamedTuple):
    """Images loaded on demand.

    Attributes:
      count: number of images.
      load: index -> pixels; thread-safe.
    """

    count: int
    load: Callable[[int], UInt8[np.ndarray, "h w 3"]]


class Parts(NamedTuple):
    """Features on disk.

    Attributes:
      files: one per batch, in order.
      sha256: hash of the pixels of all images.
      count: number of images.
    """

    files: tuple[pathlib.Path, ...]
    sha256: str
    count: int

    def features(self) -> Float[np.ndarray, "n d"]:
        """All features, float32."""
        return _features(self.files)

    def statistics(self) -> Statistics:
        """Their statistics, merged block by block; never holds all features in memory."""
        starts = range(0, len(self.files), PARTS_AT_ONCE)
        blocks = (self.files[i : i + PARTS_AT_ONCE] for i in starts)
        return frechet.merged(Statistics.of(_features(block)) for block in blocks)


def extract(
    lazy_images: LazyImages,
    network: Network,
    folder: str | os.PathLike[str],
    *,
    batch_size: int,
    log: Callable[[str], None] = print,
) -> Parts:
    """Features of all images, on all devices of this process.

    Args:
      lazy_images: the images.
      network: the feature network.
      folder: folder of the parts; several processes share it.
      batch_size: images per part.
      log: receives progress lines.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, lazy_images.count, batch_size)
    files = tuple(folder / f"{start:07d}_{batch_size}.npz" for start in starts)
    own = range(jax.process_index(), len(files), jax.process_count())
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    params = jax.device_put(network.params, NamedSharding(mesh, PartitionSpec()))
    computed = 0
    with ThreadPoolExecutor(THREADS) as pool:

        def begin(k: int) -> list[Any]:
            stop = min(starts[k] + batch_size, lazy_images.count)
            return [pool.submit(_prepare, lazy_images, network, i) for i in range(starts[k], stop)]

        pending = begin(own[0]) if len(own) else []
        for number, k in enumerate(own, 1):
            prepared = [future.result() for future in pending]
            pending = begin(own[number]) if number < len(own) else []
            hashes = np.stack([sha256 for sha256, _ in prepared])
            if _holds(files[k], hashes, network.fingerprint):
                continue
            inputs = np.stack(list(pool.map(lambda entry: entry[1](), prepared)))
            features = _apply(network, params, inputs, batch_size, mesh)
            _write(files[k], features, hashes, network.fingerprint)
            computed += 1
            if computed == 1 or number % 20 == 0 or number == len(own):
                done = min(starts[k] + batch_size, lazy_images.count)
                log(f"features of {done}/{lazy_images.count} images")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"features in {folder}")
    for file in files:
        if not file.is_file():
            raise EvaluationError(f"{file} is missing; all processes must see the same folder")
    hashes = hashlib.sha256(b"".join(_read(file)[1].tobytes() for file in files))
    return Parts(files, hashes.hexdigest(), lazy_images.count)


def _prepare(
    lazy_images: LazyImages, network: Network, index: int
) -> tuple[UInt8[np.ndarray, "32"], Callable[[], np.ndarray]]:
    """The hash of an image, and a function that computes its network input."""
    pixels = np.ascontiguousarray(lazy_images.load(index))
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.data)
    return np.frombuffer(digest.digest(), np.uint8), lambda: network.prepare(pixels)


def _apply(
    network: Network, params: Any, inputs: np.ndarray, batch_size: int, mesh: Mesh
) -> Float[np.ndarray, "n d"]:
    """Features of a batch, padded to one compiled shape that the devices divide."""
    devices = mesh.devices.size
    full = -(-batch_size // devices) * devices
    padded = np.concatenate([inputs, np.repeat(inputs[-1:], full - len(inputs), 0)])
    placed = jax.device_put(padded, NamedSharding(mesh, PartitionSpec("data")))
    # The 10-bit mantissa of TF32 products would change every score.
    with jax.default_matmul_precision("highest"):
        return np.asarray(network.apply(params, placed))[: len(inputs)].astype(np.float32)


def _write(file: pathlib.Path, features: np.ndarray, hashes: np.ndarray, network: str) -> None:
    with atomic.file(file) as partial, partial.open("wb") as stream:
        np.savez(stream, features=features, hashes=hashes, network=network)


def _read(file: pathlib.Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Features, hashes of the images, fingerprint of the network."""
    with np.load(file, allow_pickle=False) as part:
        return part["features"], part["hashes"], str(part["network"])


def _features(files: Sequence[pathlib.Path]) -> Float[np.ndarray, "n d"]:
    return np.concatenate([_read(file)[0] for file in files])


def _holds(file: pathlib.Path, hashes: np.ndarray, network: str) -> bool:
    """Whether the file is complete and belongs to these images and this network."""
    try:
        _, found, fingerprint = _read(file)
        return fingerprint == network and np.array_equal(found, hashes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
