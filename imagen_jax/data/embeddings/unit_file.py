"""A unit of an embedding store as a file: the captions of one call of the encoder.

Only real tokens are stored. A file holds a header of 64 bytes (tag; captions, tokens and width as
u64; dtype; squared error and squared norm of the rows, float64), a 16-byte hash per caption, an i32
token count per caption, the rows of all tokens, and the SHA-256 of the preceding bytes. Rows are
bfloat16, or a float32 rms per channel, a float32 scale per token and int8 values:

    row[t, c] = rms[c] * scale[t] * q[t, c]

T5 embeddings are large in a few channels; without the rms all other channels would round to zero.
Files of the first layout (a header of 32 bytes, bfloat16, no hash) are still read.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int8

from imagen_jax.io import atomic

TAG, OLD_TAG = b"IMGNEMB2", b"IMGNEMB1"
HASH_BYTES = 16
DTYPES = ("bfloat16", "int8")
_HEADER, _OLD_HEADER = struct.Struct("<8sQQQ8sdd8x"), struct.Struct("<8sQQQ")
HEADER_BYTES = _HEADER.size
SHA_BYTES = 32


class EmbeddingError(ValueError):
    """An embedding store is missing, incomplete, damaged or of another encoder."""


class Unit(NamedTuple):
    """A unit file as listed in the manifest."""

    file: str
    sha256: str
    captions: int
    tokens: int


class Header(NamedTuple):
    """The header of a unit file.

    Attributes:
      captions: number of captions.
      tokens: number of real tokens.
      dim: width D.
      dtype: of the rows, bfloat16 or int8.
      squared_error: sum over all values of (stored - exact)^2; NaN in files of the first layout.
      squared_norm: sum over all values of exact^2; NaN in files of the first layout.
      start: offset of the first byte after the header.
    """

    captions: int
    tokens: int
    dim: int
    dtype: str
    squared_error: float
    squared_norm: float
    start: int

    @property
    def rows(self) -> int:
        """Offset of the rows."""
        return self.start + (HASH_BYTES + 4) * self.captions

    @property
    def end(self) -> int:
        """Offset of the first byte after the rows."""
        return self.rows + bytes_of_rows(self.tokens, self.dim, self.dtype)


def bytes_of_rows(tokens: int, dim: int, dtype: str) -> int:
    """Size of the rows of a unit, bytes."""
    return 2 * tokens * dim if dtype == "bfloat16" else 4 * (dim + tokens) + tokens * dim


def caption_hash(text: str) -> bytes:
    """The key of a caption: the first 16 bytes of the SHA-256 of its UTF-8 form."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES]


def unit_name(captions: Iterable[str], **settings: Any) -> str:
    """File name of a unit: a hash of its captions and of all settings that change its bytes."""
    return unit_name_of(b"".join(map(caption_hash, captions)), **settings)


def unit_name_of(hashes: bytes, **settings: Any) -> str:
    """`unit_name` of the captions with these hashes, one after the other."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(hashes)
    return f"unit_{digest.hexdigest()[:24]}.bin"


def write_unit(
    path: pathlib.Path,
    captions: Sequence[str],
    rows: Sequence[Float[np.ndarray, "_ d"]],
    dtype: str = "bfloat16",
) -> None:
    """Writes a unit file atomically.

    Args:
      path: the file, named by `unit_name`.
      captions: at least one.
      rows: embeddings of the real tokens of each caption.
      dtype: of the stored rows, bfloat16 or int8.
    """
    counts = np.array([len(r) for r in rows], "<i4")
    exact = np.concatenate(rows).astype(np.float32)
    if dtype == "bfloat16":
        stored = exact.astype(ml_dtypes.bfloat16)
        content, back = stored.tobytes(), stored.astype(np.float32)
    else:
        parts = quantize(exact)
        content, back = b"".join(part.tobytes() for part in parts), dequantize(*parts)
    squared_error = float(np.sum(np.square(back - exact), dtype=np.float64))
    squared_norm = float(np.sum(np.square(exact), dtype=np.float64))
    shape = (len(captions), len(exact), exact.shape[1])
    header = _HEADER.pack(TAG, *shape, dtype.encode(), squared_error, squared_norm)
    body = header + b"".join(map(caption_hash, captions)) + counts.tobytes() + content
    publish_file(path, body + hashlib.sha256(body).digest())


def publish_file(path: pathlib.Path, content: bytes) -> None:
    """Writes a file of a store that several workers share."""
    try:
        with atomic.file(path) as temporary:
            temporary.write_bytes(content)
    except FileNotFoundError:
        # Another worker has completed the store, this file included, and removed all temporaries.
        if not path.exists():
            raise


def quantize(
    exact: Float32[np.ndarray, "t d"],
) -> tuple[Float32[np.ndarray, " d"], Float32[np.ndarray, " t"], Int8[np.ndarray, "t d"]]:
    """rms per channel, scale per token, and values in -127..127."""
    rms = np.sqrt(np.mean(np.square(exact), axis=0, dtype=np.float64)).astype(np.float32)
    rms[rms == 0] = 1.0
    even = exact / rms
    scale = np.abs(even).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1.0
    return rms, scale, np.rint(even / scale[:, None]).astype(np.int8)


def dequantize(
    rms: Float32[np.ndarray, " d"], scale: Float32[np.ndarray, " t"], q: Int8[np.ndarray, "t d"]
) -> Float32[np.ndarray, "t d"]:
    """Inverse of `quantize` up to rounding."""
    return q.astype(np.float32) * scale[:, None] * rms


def read_header(path: pathlib.Path, at: int | None = None) -> Header:
    """Reads a header.

    Args:
      path: of the file.
      at: offset of a unit in a pack; None: the file is the unit.

    Raises:
      EmbeddingError: missing or damaged.
    """
    try:
        with path.open("rb") as file:
            file.seek(at or 0)
            header = parse_header(file.read(_HEADER.size))
    except OSError:
        header = None
    if header is not None:
        size = header.end + (SHA_BYTES if header.start == _HEADER.size else 0)
        whole = path.stat().st_size
        if whole == size if at is None else whole >= at + size:
            return header
    raise EmbeddingError(f"{path} is missing or damaged; delete it and run `imagen embed`")


def parse_header(content: bytes) -> Header | None:
    """The header in the first HEADER_BYTES of a unit; None: it is none."""
    try:
        if content.startswith(TAG):
            _, count, tokens, dim, tag, error, norm = _HEADER.unpack(content)
            dtype = tag.rstrip(b"\0").decode()
            header = Header(count, tokens, dim, dtype, error, norm, _HEADER.size)
        elif content.startswith(OLD_TAG):
            _, count, tokens, dim = _OLD_HEADER.unpack(content[: _OLD_HEADER.size])
            header = Header(count, tokens, dim, "bfloat16", np.nan, np.nan, _OLD_HEADER.size)
        else:
            return None
    except (struct.error, UnicodeDecodeError):
        return None
    return header if header.dtype in DTYPES else None


def describe_unit(path: pathlib.Path, *, reread: bool = False) -> Unit:
    """The manifest row of a unit file.

    Args:
      path: the file.
      reread: compute the hash from the content instead of reading the stored one.

    Raises:
      EmbeddingError: the file is damaged.
    """
    header = read_header(path)
    with path.open("rb") as file:
        if reread or header.start == _OLD_HEADER.size:
            digest = hashlib.sha256()
            left = header.end
            while left:
                part = file.read(min(left, 1 << 20))
                digest.update(part)
                left -= len(part)
            sha256 = digest.hexdigest()
        else:
            file.seek(header.end)
            sha256 = file.read(SHA_BYTES).hex()
    return Unit(path.name, sha256, header.captions, header.tokens)


class Rows:
    """The rows of a unit file, memory-mapped."""

    def __init__(self, path: pathlib.Path, at: int | None = None) -> None:
        """Opens a file, or the unit at an offset of a pack. Raises EmbeddingError."""
        header, start = read_header(path, at), at or 0
        raw = np.memmap(path, mode="r")[start + header.rows : start + header.end]
        shape = (header.tokens, header.dim)
        self._scales = None
        if header.dtype == "bfloat16":
            self._rows = raw.view(ml_dtypes.bfloat16).reshape(shape)
        else:
            scales = np.array(raw[: 4 * (header.dim + header.tokens)]).view("<f4")
            self._scales = scales[: header.dim], scales[header.dim :]
            self._rows = raw[4 * (header.dim + header.tokens) :].view(np.int8).reshape(shape)

    def __getitem__(self, tokens: slice) -> np.ndarray:
        """The rows of a range of tokens, bfloat16."""
        if self._scales is None:
            return self._rows[tokens]
        rms, scale = self._scales
        return dequantize(rms, scale[tokens], self._rows[tokens]).astype(ml_dtypes.bfloat16)


def read_keys(path: pathlib.Path, at: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Hashes S16[n] and token counts i4[n] of the captions; `at` as in `read_header`.

    Raises:
      EmbeddingError: missing or damaged.
    """
    header = read_header(path, at)
    with path.open("rb") as file:
        file.seek((at or 0) + header.start)
        content = file.read(header.rows - header.start)
    split = HASH_BYTES * header.captions
    hashes, counts = content[:split], np.frombuffer(content[split:], "<i4")
    if counts.min(initial=0) < 0 or counts.sum(dtype=np.int64) != header.tokens:
        raise EmbeddingError(f"{path} is damaged; delete it and run `imagen embed`")
    return np.frombuffer(hashes, f"S{HASH_BYTES}"), counts
