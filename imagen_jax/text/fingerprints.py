"""The fingerprint of a text encoder, kept in the user's cache while its files stay as they are.

A fingerprint hashes all weights, which takes minutes for an XXL. Names, sizes and modification
times of the encoder's files, and the configuration, say whether a kept one holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

from imagen_jax.config.text import TextConfig
from imagen_jax.io import atomic
from imagen_jax.text.encoders import load_text_encoder

_VERSION = 1  # Increased when the content of fingerprints changes.


def fingerprint(config: TextConfig) -> dict[str, str | int]:
    """`load_text_encoder(config).fingerprint()`, read from the cache where it is there.

    Raises:
      ConfigError, WeightsError: see `load_text_encoder`.
    """
    file = _cache_file(config)
    if file is not None and file.exists():
        with contextlib.suppress(OSError, ValueError):  # Damaged, or just removed.
            return json.loads(file.read_text())
    found = load_text_encoder(config).fingerprint()
    if file is not None:
        with contextlib.suppress(OSError):  # No writable home folder.
            atomic.write_json(file, found)
    return found


def _cache_file(config: TextConfig) -> pathlib.Path | None:
    """The file of a fingerprint; None: the encoder is no folder, or there is no home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isdir(config.path) or not os.path.isabs(home):
        return None
    fields = {**dataclasses.asdict(config), "fingerprint": ""}
    files = sorted(_files(pathlib.Path(config.path).resolve()))
    if config.vocabulary and os.path.exists(config.vocabulary):
        files.append(_stat(pathlib.Path(config.vocabulary)))
    text = json.dumps([_VERSION, fields, files])
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    return pathlib.Path(home) / "imagen_jax" / "fingerprints" / f"{name}.json"


def _files(folder: pathlib.Path) -> Iterator[tuple[str, int, int]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield _stat(path)
    for path in folder.parent.glob("*.model"):  # A vocabulary beside a t5x checkpoint.
        yield _stat(path)


def _stat(path: pathlib.Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
