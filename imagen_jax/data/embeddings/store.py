"""The ragged store of text embeddings, keyed by caption hash and memory-mapped.

`embed` writes it once, one unit of captions at a time; the pipeline looks captions up. Only real
tokens are stored: 20 tokens of 4096 channels are 164 kB in bfloat16 and 82 kB in int8; padded to
128 tokens they are 1 MB. The paper also encodes captions before training (Imagen, Sec. 2.5).

A folder holds unit files (`unit_file.py`), or packs of many (`packs.py`), and, once complete, the
sorted table of all captions (`key_table.py`) and `manifest.json`. It may be in a bucket
(`remote.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Bool

from imagen_jax.data.embeddings import key_table, packs, remote
from imagen_jax.data.embeddings.key_table import UnitKeys
from imagen_jax.data.embeddings.unit_file import (
    HASH_BYTES,
    EmbeddingError,
    Header,
    Rows,
    Unit,
    caption_hash,
    describe_unit,
    publish_file,
    read_header,
    read_keys,
    unit_name,
    write_unit,
)
from imagen_jax.io import atomic, buckets, mirrors, paths

__all__ = [
    "EmbeddingError",
    "EmbeddingStore",
    "Unit",
    "caption_hash",
    "describe_unit",
    "unit_name",
    "write_manifest",
    "write_unit",
]

MANIFEST = "manifest.json"
_NAME = re.compile(r"\w[\w.-]{0,200}", re.ASCII)
MAX_OPEN_UNITS = 1024  # Mapped unit files; the number of maps of a process is limited.


def write_manifest(folder: pathlib.Path, units: Sequence[Unit], fingerprint: dict) -> None:
    """Writes `manifest.json`, which marks a store as complete; equal for all workers."""
    headers = [read_header(folder / u.file) for u in units]
    manifest = {
        **_summary(fingerprint, headers, units),
        "units": [u._asdict() for u in units],
    }
    keys = (UnitKeys(*read_keys(folder / unit.file)) for unit in units)
    key_table.write(folder, keys, tag=_tag(manifest), captions=manifest["captions"])
    publish_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def write_packed(
    folder: pathlib.Path, names: Sequence[str], *, fingerprint: dict, plan: str
) -> None:
    """Packs the finished units of a large store, and writes its key table and manifest.

    Args:
      folder: of the store.
      names: of the units, in the order of the plan.
      fingerprint: of the encoder.
      plan: hash of the plan.
    """
    rows, places, headers = [], [], []
    for pack, units in packs.pack(folder, names):
        path = folder / pack.file
        headers += [read_header(path, unit.start) for unit in units]
        places += [(len(rows), unit.start) for unit in units]
        rows.append(pack)
    manifest = {
        **_summary(fingerprint, headers, rows),
        "plan": plan,
        "packs": [pack._asdict() for pack in rows],
    }
    tag = _tag(manifest)
    with atomic.file(folder / f"units_{tag}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, np.array(places, np.int64).reshape(-1, 2))
    keys = (UnitKeys(*read_keys(folder / rows[n].file, at)) for n, at in places)
    key_table.write(folder, keys, tag=tag, captions=manifest["captions"])
    publish_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _summary(
    fingerprint: dict, headers: Sequence[Header], files: Sequence[Unit | packs.Pack]
) -> dict[str, Any]:
    """What a manifest says of all units together."""
    norm = sum(h.squared_norm for h in headers)
    error = (sum(h.squared_error for h in headers) / norm) ** 0.5 if norm else 0.0
    return {
        "fingerprint": fingerprint,
        "dim": headers[0].dim,
        "dtype": headers[0].dtype,
        "captions": sum(f.captions for f in files),
        "tokens": sum(f.tokens for f in files),
        # Root of the summed squared error over the squared norm; NaN in units of the first layout.
        "relative_rms_error": error if error == error else None,
    }


def publish_tables(folder: pathlib.Path) -> None:
    """Copies the tables and then the manifest of a store to the bucket that the folder mirrors."""
    tag = _tag(json.loads((folder / MANIFEST).read_text("utf-8")))
    for path in [*key_table.paths(folder, tag), folder / MANIFEST]:
        buckets.write(str(mirrors.origin(path)), path.read_bytes())


def plan_of(folder: pathlib.Path) -> str:
    """The hash of the plan of a complete, packed store; "": it is another, or incomplete."""
    path = folder / MANIFEST
    return json.loads(path.read_text()).get("plan", "") if path.exists() else ""


def _tag(manifest: dict) -> str:
    """A hash of the units of a store, by which its tables are named."""
    rows = manifest.get("packs") or manifest["units"]
    names = [[row["file"], row["sha256"]] for row in rows]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


@runtime_checkable
class CaptionSource(Protocol):
    """A source of captions: its fingerprint, and the hashes of its captions in blocks."""

    fingerprint: str
    further_captions: tuple[str, ...]

    def hash_blocks(self) -> Iterator[np.ndarray]:
        """S16, as in the store."""
        ...


class EmbeddingStore:
    """Embeddings by caption.

    Attributes:
      feature: name of the text in a batch.
      dim: width D.
      fingerprint: of the encoder that wrote the store.
      captions: number of captions.
    """

    feature = "text_emb"

    def __init__(self, folder: pathlib.Path, manifest: dict) -> None:
        """Use `open`."""
        self._folder = folder
        self._manifest = manifest
        self.dim: int = manifest["dim"]
        self.fingerprint: dict = manifest["fingerprint"]
        self.captions: int = manifest["captions"]
        self._tag = _tag(manifest)
        self._places = None
        self._address = mirrors.origin(folder)
        self._reads = None
        if self._address:
            remote.pull_tables(folder, self._tag, packed="packs" in manifest)
            self._reads = ThreadPoolExecutor(buckets.THREADS, thread_name_prefix="embeddings")
            if "packs" in manifest:
                self._places = _read_places(folder / f"units_{self._tag}.npy", manifest["packs"])
            headers = []
        elif "packs" in manifest:
            _check_packs(folder, manifest["packs"])
            self._places = _read_places(folder / f"units_{self._tag}.npy", manifest["packs"])
            pack, start = self._places[0].tolist()
            headers = [read_header(folder / manifest["packs"][pack]["file"], start)]
        else:
            headers = [read_header(folder / row["file"]) for row in manifest["units"]]
        if any(header.dim != self.dim for header in headers):
            raise _damaged(folder / MANIFEST)
        # Maps a unit on first use; closes the least recently used one.
        self._rows = functools.lru_cache(MAX_OPEN_UNITS)(self._open_rows)
        # A store of an earlier version has no table; `embed` adds it.
        table = key_table.read(folder, self._tag) or key_table.build(
            UnitKeys(*read_keys(folder / row["file"])) for row in manifest["units"]
        )
        self._keys, self._units, self._offsets, self._counts = table

    @classmethod
    def open(cls, path: str, expected_fingerprint: dict | None = None) -> EmbeddingStore:
        """Opens a complete store.

        Args:
          path: its folder.
          expected_fingerprint: of the encoder in use; None: not checked.

        Raises:
          EmbeddingError: no store, an incomplete or damaged one, or one of another encoder.
          PathError: a path with a scheme other than gs:// and s3://.
          BucketError: a bucket cannot be read.
        """
        if buckets.is_address(path):
            folder = remote.pull_manifest(path, MANIFEST)
        else:
            folder = paths.local(path, "config.data.embeddings")
        if not path or not folder.is_dir():
            raise EmbeddingError(f"config.data.embeddings={path!r} is no store; run `imagen embed`")
        if not (folder / MANIFEST).exists():
            raise EmbeddingError(
                f"config.data.embeddings={path!r} is incomplete "
                f"({len(list(folder.glob('unit_*.bin')))} finished units, no {MANIFEST}); "
                "run `imagen embed` again, it continues there"
            )
        manifest = _read_manifest(folder / MANIFEST)
        if expected_fingerprint is not None:
            _check_fingerprint(path, manifest["fingerprint"], expected_fingerprint)
        return cls(folder, manifest)

    def verify(self) -> None:
        """Reads every unit on a disk and compares its hash. EmbeddingError: a damaged one."""
        for row in self._manifest.get("packs", ()):
            with (self._folder / row["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != row["sha256"]:
                    raise EmbeddingError(
                        f"{self._folder / row['file']} is damaged; delete it with its .json and "
                        f"{MANIFEST}, and run `imagen embed`"
                    )
        for row in self._manifest.get("units", ()):
            path = self._folder / row["file"]
            hashes = {describe_unit(path, reread=reread).sha256 for reread in (False, True)}
            if hashes != {row["sha256"]}:
                raise EmbeddingError(f"{path} is damaged; delete it and run `imagen embed`")

    def missing(self, captions: Iterable[str]) -> list[str]:
        """The captions that the store lacks, each once."""
        unique = list(dict.fromkeys(captions))
        known = self._keys[self._find(unique)] == _hashes(unique)
        return [caption for caption, is_known in zip(unique, known, strict=True) if not is_known]

    def spec(self, max_text_len: int) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of the padded embeddings of one example."""
        return (max_text_len, self.dim), "bfloat16"

    def contains(self, hashes: np.ndarray) -> Bool[np.ndarray, " k"]:
        """Whether the store has the captions with these hashes (S16)."""
        rows = np.searchsorted(self._keys, hashes).clip(max=len(self._keys) - 1)
        return self._keys[rows] == hashes

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

        def copy(out: np.ndarray, row: int, count: int) -> None:
            start = int(self._offsets[row])
            out[:count] = self._rows(int(self._units[row]))[start : start + count]

        for _ in (self._reads.map if self._reads else map)(
            copy, text_emb, rows.tolist(), counts.tolist()
        ):
            pass
        return text_emb, np.arange(max_text_len) < counts[:, None]

    def covers(self, source: CaptionSource) -> bool:
        """Whether every caption of a source is in the store; a result of before is remembered."""
        text = f"{self._tag} {source.fingerprint} {source.further_captions}".encode()
        known = self._folder / f".covers_{hashlib.sha256(text).hexdigest()[:16]}"
        if known.exists():
            return True
        if not all(self.contains(np.sort(block)).all() for block in source.hash_blocks()):
            return False
        with contextlib.suppress(OSError):  # A shared store may be read-only for this user.
            known.touch()
        return True

    def _open_rows(self, number: int) -> Rows | remote.RemoteRows:
        if self._places is None:
            file, start = self._manifest["units"][number]["file"], None
        else:
            pack, start = self._places[number].tolist()
            file = self._manifest["packs"][pack]["file"]
        if self._address:
            return remote.RemoteRows(buckets.join(self._address, file), start)
        return Rows(self._folder / file, start)

    def _find(self, captions: Sequence[str]) -> np.ndarray:
        """Table row of each caption; any row for a missing one."""
        return np.searchsorted(self._keys, _hashes(captions)).clip(max=len(self._keys) - 1)


def _hashes(captions: Sequence[str]) -> np.ndarray:
    return np.array([caption_hash(c) for c in captions], f"S{HASH_BYTES}")


def _read_manifest(path: pathlib.Path) -> dict:
    """The manifest of a store. Raises EmbeddingError: it is damaged, or names other folders."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
        packed = "packs" in manifest
        rows = manifest["packs"] if packed else manifest["units"]
        numbers = ["captions", "tokens", *(("bytes", "units") if packed else ())]
        values = [(manifest, ("dim", "captions")), *((row, numbers) for row in rows)]
        usable = (
            bool(rows)
            and isinstance(manifest["fingerprint"], dict)
            and all(
                type(one[name]) is int and one[name] >= 0 for one, names in values for name in names
            )
            and all(isinstance(row["sha256"], str) and _is_name(row["file"]) for row in rows)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        usable = False
    if not usable:
        raise _damaged(path)
    return manifest


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(_NAME.fullmatch(value))


def _damaged(path: pathlib.Path) -> EmbeddingError:
    return EmbeddingError(f"{path} is damaged; delete it and run `imagen embed`")


def _read_places(path: pathlib.Path, rows: Sequence[dict]) -> np.ndarray:
    """Pack and offset of each unit, memory-mapped. Raises EmbeddingError: missing or damaged."""
    try:
        places = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path.with_name(MANIFEST)) from error
    if places.dtype != np.int64 or places.shape != (sum(row["units"] for row in rows), 2):
        raise _damaged(path.with_name(MANIFEST))
    return places


def _check_packs(folder: pathlib.Path, rows: Sequence[dict]) -> None:
    """Raises EmbeddingError: a pack is missing or has another size."""
    for row in rows:
        path = folder / row["file"]
        if not path.exists() or path.stat().st_size != row["bytes"]:
            raise EmbeddingError(f"{path} is missing or damaged; copy the store again")


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
