"""An embedding store in a bucket: tables are copied, rows are written whole and read by ranges.

Opening a store reads its manifest and its tables, which the user's cache keeps. A lookup reads the
rows of each caption with one request; the first caption of a unit reads the unit's header, too.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from imagen_jax.data.embeddings import key_table, packs, unit_file
from imagen_jax.data.embeddings.unit_file import EmbeddingError
from imagen_jax.io import atomic, buckets, mirrors


def pull_manifest(address: str, name: str) -> pathlib.Path:
    """Copies the manifest of a store.

    Args:
      address: of the store.
      name: of the manifest.

    Returns:
      The local folder that stands for the store.

    Raises:
      EmbeddingError: there is no manifest.
      BucketError: the bucket cannot be read.
    """
    folder = mirrors.folder(address)
    try:
        content = buckets.read(buckets.join(address, name)).data
    except buckets.MissingError:
        raise EmbeddingError(
            f"config.data.embeddings={address!r} is no complete store (no {name}); run `imagen "
            "embed`, it continues there"
        ) from None
    with atomic.file(folder / name) as temporary:
        temporary.write_bytes(content)
    return folder


def pull_tables(folder: pathlib.Path, tag: str, *, packed: bool) -> None:
    """Copies the tables of a store into its local folder, unless they are there.

    Args:
      folder: of `pull_manifest`.
      tag: of the store; the names of the tables hold it.
      packed: whether the units are in packs.

    Raises:
      EmbeddingError: a table is missing.
    """
    paths = key_table.paths(folder, tag) + ([folder / f"units_{tag}.npy"] if packed else [])
    for path in paths:
        if path.exists():
            continue
        try:
            content = buckets.read(str(mirrors.origin(path))).data
        except buckets.MissingError as error:
            raise EmbeddingError(f"{error}; copy the store there again, complete") from None
        with atomic.file(path) as temporary:
            temporary.write_bytes(content)


class RemoteFinished(packs.Finished):
    """Which units of a bucket are finished."""

    def refresh(self) -> None:
        """Lists the bucket."""
        address = str(mirrors.origin(self._folder))
        self._lists = {name for name in buckets.names(address) if name.endswith(".bin")}

    def check(self, name: str) -> bool:
        """Whether a unit is finished by now; one request."""
        return bool(buckets.tag(str(mirrors.origin(self._folder / name))))

    def __contains__(self, name: str) -> bool:
        return name in self._lists


def publish_unit(path: pathlib.Path) -> None:
    """Moves a unit file to the bucket; its header, keys and hash stay, as `fetch_heads` reads."""
    content = path.read_bytes()
    buckets.write(str(mirrors.origin(path)), content)
    header = unit_file.read_header(path)
    _write_head(path, content[: header.rows], content[header.end :], header.end)


def fetch_heads(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Makes files with header, keys and hash of the units of other workers; rows are holes.

    Args:
      folder: the mirror of a store.
      names: of its units.
    """

    def fetch(name: str) -> None:
        path = folder / name
        if path.exists():
            return
        address = str(mirrors.origin(path))
        header = unit_file.parse_header(buckets.read(address, 0, unit_file.HEADER_BYTES).data)
        if header is None:
            raise EmbeddingError(f"{address} is damaged; delete it and run `imagen embed`")
        start = buckets.read(address, 0, header.rows).data
        digest = buckets.read(address, header.end, unit_file.SHA_BYTES).data
        _write_head(path, start, digest, header.end)

    with ThreadPoolExecutor(buckets.THREADS) as pool:
        list(pool.map(fetch, names))


def _write_head(path: pathlib.Path, start: bytes, digest: bytes, end: int) -> None:
    with atomic.file(path, durable=False) as temporary, temporary.open("wb") as file:
        file.write(start)
        file.seek(end)
        file.write(digest)


class RemoteRows:
    """The rows of a unit in a bucket; see `unit_file.Rows`."""

    def __init__(self, address: str, at: int | None = None) -> None:
        """Reads the header of a file, or of the unit at an offset of a pack."""
        self._address, start = address, at or 0
        try:
            header = unit_file.parse_header(self._read(start, unit_file.HEADER_BYTES))
        except buckets.MissingError as error:
            raise EmbeddingError(f"{error}; run `imagen embed`") from None
        if header is None:
            raise EmbeddingError(f"{address} is damaged; delete it and run `imagen embed`")
        self._header, self._start, self._scales = header, start + header.rows, None
        if header.dtype == "int8":
            size = 4 * (header.dim + header.tokens)
            scales = np.frombuffer(self._read(self._start, size), "<f4")
            self._scales = scales[: header.dim], scales[header.dim :]
            self._start += size

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """The rows of a range of tokens, bfloat16."""
        dim, width = self._header.dim, 2 if self._scales is None else 1
        count = tokens.stop - tokens.start
        if not count:
            return np.zeros((0, dim), ml_dtypes.bfloat16)
        data = self._read(self._start + width * dim * tokens.start, width * dim * count)
        if self._scales is None:
            return np.frombuffer(data, ml_dtypes.bfloat16).reshape(count, dim)
        rms, scale = self._scales
        values = np.frombuffer(data, np.int8).reshape(count, dim)
        return unit_file.dequantize(rms, scale[tokens], values).astype(ml_dtypes.bfloat16)

    def _read(self, offset: int, size: int) -> bytes:
        return buckets.read(self._address, offset, size).data
