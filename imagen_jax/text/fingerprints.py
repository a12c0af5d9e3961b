"""The fingerprint of a text encoder, kept in the user's cache while its files stay as they are.

A fingerprint hashes all weights, which takes minutes for an XXL. Names, sizes and modification
times of the encoder's files, and the configuration, say whether a kept one holds. Of an encoder in
a bucket these are the versions of some of its objects, and the fingerprint is also kept beside the
embeddings, so that the machines of a run do not all read the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from imagen_jax.config.text import TextConfig
from imagen_jax.io import atomic, buckets
from imagen_jax.text.encoders import load_text_encoder

_VERSION = 1  # Increased when the content of fingerprints changes.
# Of an encoder in a bucket: objects that differ between any two, and the others that matter.
_WEIGHTS = ("target.token_embedder.embedding/0.0", "model.safetensors", "pytorch_model.bin")
_OTHERS = ("checkpoint", "config.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
_BESIDE = ("spiece.model", "t5_config.json", "tokenizer.json")  # Or in the folder above.


def fingerprint(config: TextConfig, store: str = "") -> dict[str, str | int]:
    """`load_text_encoder(config).fingerprint()`, read from the cache where it is there.

    Args:
      config: the encoder.
      store: folder of the embeddings; that of an encoder in a bucket is kept there, too.

    Raises:
      ConfigError, WeightsError: see `load_text_encoder`.
      BucketError: a bucket cannot be read.
    """
    file = _cache_file(config)
    with contextlib.suppress(OSError, ValueError):  # Damaged, or just removed.
        if file is not None and file.exists():
            return json.loads(file.read_text())
    with contextlib.suppress(buckets.BucketError, ValueError):
        if address := _shared(file, config, store):
            return json.loads(buckets.read(address).data)
    found = load_text_encoder(config).fingerprint()
    _keep(file, _shared(file, config, store), found)
    return found


def keep(config: TextConfig, store: str, found: dict[str, str | int]) -> None:
    """Keeps the fingerprint of an encoder that is loaded; arguments as of `fingerprint`."""
    file = _cache_file(config)
    _keep(file, _shared(file, config, store), found)


def _keep(file: pathlib.Path | None, address: str, found: dict[str, str | int]) -> None:
    if file is not None:
        with contextlib.suppress(OSError):  # No writable home folder.
            atomic.write_json(file, found)
    if address:
        with contextlib.suppress(buckets.BucketError):  # No right to write.
            buckets.write(address, json.dumps(found).encode())


def _shared(file: pathlib.Path | None, config: TextConfig, store: str) -> str:
    """Address of a fingerprint beside the embeddings; "": none."""
    both = buckets.is_address(config.path) and buckets.is_address(store)
    return buckets.join(store, f"encoder_{file.name}") if both and file is not None else ""


def _cache_file(config: TextConfig) -> pathlib.Path | None:
    """The file of a fingerprint; None: it cannot be kept, or there is no home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    files: list[Any] = []
    if buckets.is_address(config.path):
        files = _versions(config)
    elif os.path.isdir(config.path):
        files += sorted(_files(pathlib.Path(config.path).resolve()))
        if config.vocabulary and os.path.exists(config.vocabulary):
            files.append(_stat(pathlib.Path(config.vocabulary)))
    if not files or not os.path.isabs(home):
        return None
    fields = {**dataclasses.asdict(config), "fingerprint": ""}
    text = json.dumps([_VERSION, fields, files])
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    return pathlib.Path(home) / "imagen_jax" / "fingerprints" / f"{name}.json"


def _versions(config: TextConfig) -> list[str]:
    """Tags of objects of an encoder in a bucket; []: its weights are in none of these."""
    folder = config.path.rstrip("/")
    found = [buckets.join(folder, name) for name in (*_WEIGHTS, *_OTHERS, *_BESIDE)]
    found += [buckets.join(folder.rpartition("/")[0], name) for name in _BESIDE]
    if buckets.is_address(config.vocabulary):
        found.append(config.vocabulary)
    with ThreadPoolExecutor(buckets.THREADS) as pool:
        tags = list(pool.map(buckets.tag, found))
    return tags if any(tags[: len(_WEIGHTS)]) else []


def _files(folder: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield _stat(path)
    for path in folder.parent.glob("*.model"):  # A vocabulary beside a t5x checkpoint.
        yield _stat(path)


def _stat(path: pathlib.Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
