"""The ragged store of text embeddings, keyed by caption hash and read by memory map.

`embed` writes it once, a unit of captions at a time; the pipeline looks captions up in it. Only the
real tokens are kept, in bfloat16: 20 tokens of 4096 channels are 164 kB, padded to 128 they would
be 1 MB. The paper too encodes its captions ahead of training (Imagen, Sec. 2.5).

A folder holds `manifest.json` and unit files. A unit file: 32 bytes of header (tag, then captions,
tokens and width as u64), one 16-byte hash per caption, one i32 token count per caption, and the
bfloat16 rows of all tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Bool

MANIFEST = "manifest.json"
TAG = b"IMGNEMB1"
HASH_BYTES = 16


class EmbeddingError(ValueError):
    """An embedding store that is missing, incomplete, damaged or made by another encoder."""


class Unit(NamedTuple):
    """A finished unit file, as listed in the manifest."""

    file: str
    sha256: str
    captions: int
    tokens: int


def caption_hash(text: str) -> bytes:
    """The key of a caption: the first 16 bytes of the SHA-256 of its UTF-8 form."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:HASH_BYTES]


def unit_name(captions: Iterable[str], **settings: Any) -> str:
    """File name of a unit: a hash of its captions and of all that its bytes depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for caption in captions:
        digest.update(caption_hash(caption))
    return f"unit_{digest.hexdigest()[:24]}.bin"


def write_unit(
    path: pathlib.Path, captions: Sequence[str], rows: Sequence[BFloat16[np.ndarray, "_ d"]]
) -> None:
    """Writes a unit file; it appears whole or not at all, whoever else writes the same one.

    Args:
      path: the file, named by `unit_name`.
      captions: at least one.
      rows: embeddings of the real tokens of each caption.
    """
    counts = np.array([len(r) for r in rows], "<i4")
    header = struct.pack("<8sQQQ", TAG, len(captions), counts.sum(), rows[0].shape[1])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(header + b"".join(map(caption_hash, captions)) + counts.tobytes())
        file.write(np.concatenate(rows).tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def describe_unit(path: pathlib.Path) -> Unit:
    """The manifest row of a unit file, its hash computed from what is on disk.

    Raises:
      EmbeddingError: the file is damaged.
    """
    with path.open("rb") as file:
        captions, tokens, _ = _read_header(path)
        return Unit(path.name, hashlib.file_digest(file, "sha256").hexdigest(), captions, tokens)


def write_manifest(folder: pathlib.Path, units: Sequence[Unit], fingerprint: dict) -> None:
    """Declares a store complete."""
    manifest = {
        "fingerprint": fingerprint,
        "dim": _read_header(folder / units[0].file)[2],
        "dtype": "bfloat16",
        "captions": sum(u.captions for u in units),
        "tokens": sum(u.tokens for u in units),
        "units": [u._asdict() for u in units],
    }
    temporary = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    os.replace(temporary, folder / MANIFEST)


def _read_header(path: pathlib.Path) -> tuple[int, int, int]:
    """Captions, tokens and width of a unit file, checked against its length."""
    try:
        with path.open("rb") as file:
            tag, captions, tokens, dim = struct.unpack("<8sQQQ", file.read(32))
    except (FileNotFoundError, struct.error):
        tag = b""
    wanted = 32 + (HASH_BYTES + 4) * captions + 2 * tokens * dim if tag == TAG else -1
    if not path.exists() or path.stat().st_size != wanted:
        raise EmbeddingError(f"{path} is missing or damaged; delete it and run `imagen embed`")
    return captions, tokens, dim


class EmbeddingStore:
    """Embeddings by caption.

    Attributes:
      dim: width D.
      fingerprint: what the encoder said of itself when the store was written.
      captions: number of captions held.
    """

    def __init__(self, folder: pathlib.Path, manifest: dict) -> None:
        """Use `open`."""
        self._folder = folder
        self._manifest = manifest
        self.dim: int = manifest["dim"]
        self.fingerprint: dict = manifest["fingerprint"]
        self.captions: int = manifest["captions"]
        self._data, hashes, counts, units, offsets = [], [], [], [], []
        for number, row in enumerate(manifest["units"]):
            path = folder / row["file"]
            n, tokens, dim = _read_header(path)
            raw = np.memmap(path, mode="r")
            body = 32 + (HASH_BYTES + 4) * n
            hashes.append(np.array(raw[32 : 32 + HASH_BYTES * n]).view(f"S{HASH_BYTES}"))
            counts.append(np.array(raw[32 + HASH_BYTES * n : body]).view("<i4"))
            units.append(np.full(n, number, np.int32))
            offsets.append(np.cumsum(counts[-1], dtype=np.int64) - counts[-1])
            self._data.append(raw[body:].view(ml_dtypes.bfloat16).reshape(tokens, dim))
        keys = np.concatenate(hashes)
        order = np.argsort(keys)
        self._keys, self._counts = keys[order], np.concatenate(counts)[order]
        self._units, self._offsets = np.concatenate(units)[order], np.concatenate(offsets)[order]

    @classmethod
    def open(cls, path: str, expected_fingerprint: dict | None = None) -> EmbeddingStore:
        """Opens a finished store.

        Args:
          path: its folder.
          expected_fingerprint: of the encoder in use; None: any store will do.

        Raises:
          EmbeddingError: no store, an unfinished or damaged one, or one of another encoder.
        """
        folder = pathlib.Path(path)
        if not path or not folder.is_dir():
            raise EmbeddingError(f"config.data.embeddings={path!r} is no store; run `imagen embed`")
        if not (folder / MANIFEST).exists():
            raise EmbeddingError(
                f"config.data.embeddings={path!r} is incomplete "
                f"({len(list(folder.glob('unit_*.bin')))} finished units, no {MANIFEST}); "
                "run `imagen embed` again, it continues there"
            )
        manifest = json.loads((folder / MANIFEST).read_text())
        if expected_fingerprint is not None:
            _check_fingerprint(path, manifest["fingerprint"], expected_fingerprint)
        return cls(folder, manifest)

    def verify(self) -> None:
        """Reads every unit and compares its hash. Raises EmbeddingError naming the damaged one."""
        for row in self._manifest["units"]:
            if describe_unit(self._folder / row["file"]).sha256 != row["sha256"]:
                raise EmbeddingError(
                    f"{self._folder / row['file']} is damaged; delete it and run `imagen embed`"
                )

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Those of the captions that the store does not hold, each once."""
        unique = list(dict.fromkeys(captions))
        known = self._keys[self._find(unique)] == _hashes(unique)
        return [caption for caption, is_known in zip(unique, known, strict=True) if not is_known]

    def lookup(
        self, captions: Sequence[str], max_text_len: int
    ) -> tuple[BFloat16[np.ndarray, "b l d"], Bool[np.ndarray, "b l"]]:
        """Embeddings padded with zeros, or cut, to `max_text_len` tokens.

        Args:
          captions: B texts.
          max_text_len: L, tokens.

        Returns:
          Embeddings [B, L, D] and mask [B, L], True at real tokens.

        Raises:
          EmbeddingError: a caption is not in the store.
        """
        rows = self._find(captions)
        if (self._keys[rows] != _hashes(captions)).any():
            absent = self.missing(captions)
            raise EmbeddingError(
                f"config.data.embeddings={str(self._folder)!r} lacks {len(absent)} caption(s), "
                f"the first: {absent[0]!r}; run `imagen embed` for this data"
            )
        counts = np.minimum(self._counts[rows], max_text_len)
        text_emb = np.zeros((len(captions), max_text_len, self.dim), ml_dtypes.bfloat16)
        for out, row, count in zip(text_emb, rows, counts, strict=True):
            start = self._offsets[row]
            out[:count] = self._data[self._units[row]][start : start + count]
        return text_emb, np.arange(max_text_len) < counts[:, None]

    def _find(self, captions: Sequence[str]) -> np.ndarray:
        """Table row of each caption; of an absent one, any row."""
        return np.searchsorted(self._keys, _hashes(captions)).clip(max=len(self._keys) - 1)


def _hashes(captions: Sequence[str]) -> np.ndarray:
    return np.array([caption_hash(c) for c in captions], f"S{HASH_BYTES}")


def _check_fingerprint(path: str, stored: dict, expected: dict) -> None:
    expected = json.loads(json.dumps(expected))
    differing = [
        f"{key}: store {stored.get(key)!r}, expected {expected.get(key)!r}"
        for key in sorted(stored.keys() | expected.keys())
        if stored.get(key) != expected.get(key)
    ]
    if differing:
        raise EmbeddingError(
            f"config.data.embeddings={path!r} was made by another encoder "
            f"({'; '.join(differing)}); run `imagen embed` into a new folder"
        )
