"""The plan of an embedding store: which captions form which unit, as memory-mapped columns.

A plan is a folder of .npy files: the texts of all captions in the order of the units as one column
of bytes, with the end and the hash of each, and for each unit its number of captions, padded length
and tokens. It is written from parts with ascending hashes, two passes over which need no memory for
the texts.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.data.embeddings.unit_file import HASH_BYTES, caption_hash

_HASH = f"S{HASH_BYTES}"


class UnitOfWork(NamedTuple):
    """A unit to encode: padded length in tokens, captions, number of real tokens, hashes (S16)."""

    length: int
    captions: Sequence[str]
    tokens: int
    hashes: np.ndarray


class Plan(NamedTuple):
    """All units, with counts of distinct captions, tokens and truncated captions."""

    units: list[UnitOfWork]
    unique: int
    tokens: int
    truncated: int


class Part(NamedTuple):
    """Distinct captions in ascending order of their hashes.

    Attributes:
      hashes: S16 of each.
      texts: of all captions, UTF-8, one after the other.
      ends: int64, offset of the first byte after each.
      tokens: int32, real tokens of each.
      lengths: int32, tokens to which each is padded.
      truncated: number of captions that are cut.
    """

    hashes: np.ndarray
    texts: np.ndarray
    ends: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    truncated: int


def make_part(captions: Sequence[str], tokens: np.ndarray, lengths: np.ndarray, cut: int) -> Part:
    """A part of captions in ascending order of their hashes; `cut`: number of truncated ones."""
    texts = [caption.encode("utf-8", "surrogatepass") for caption in captions]
    content = np.frombuffer(b"".join(texts), np.uint8)
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    hashes = np.array([caption_hash(caption) for caption in captions], _HASH)
    return Part(hashes, content, ends, tokens.astype(np.int32), lengths.astype(np.int32), cut)


def write(folder: pathlib.Path, parts: Callable[[], Iterable[Part]], unit_size: int) -> None:
    """Writes a plan.

    Args:
      folder: an empty folder.
      parts: gives all parts, in ascending order of the hashes; called twice.
      unit_size: captions of one length per unit, at most.
    """
    counts: dict[int, int] = {}
    sizes: dict[int, int] = {}
    unique = truncated = 0
    for part in parts():
        unique, truncated = unique + len(part.ends), truncated + part.truncated
        for length, rows in _by_length(part):
            counts[length] = counts.get(length, 0) + len(rows)
            sizes[length] = sizes.get(length, 0) + int(_sizes(part)[rows].sum())
    lengths = sorted(counts)
    texts = _column(folder, "texts", np.uint8, sum(sizes.values()))
    ends = _column(folder, "ends", np.int64, unique)
    hashes = _column(folder, "hashes", _HASH, unique)
    first, start = _starts(counts, lengths), _starts(sizes, lengths)
    tokens: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
    for part in parts():
        content, last = part.texts.tobytes(), part.ends.tolist()
        for length, rows in _by_length(part):
            spans = [content[last[i - 1] if i else 0 : last[i]] for i in rows.tolist()]
            data, at = np.frombuffer(b"".join(spans), np.uint8), start[length]
            texts[at : at + len(data)] = data
            own = slice(first[length], first[length] + len(rows))
            ends[own], hashes[own] = at + np.cumsum(_sizes(part)[rows]), part.hashes[rows]
            start[length], first[length] = at + len(data), own.stop
            tokens[length].append(part.tokens[rows])
    units = [_units(length, np.concatenate(tokens[length]), unit_size) for length in lengths]
    columns = [np.concatenate(column) for column in zip(*units, strict=True)]
    for name, column in zip(("lengths", "counts", "tokens"), columns, strict=True):
        np.save(folder / f"{name}.npy", column)
    np.save(folder / "numbers.npy", np.array([unique, columns[2].sum(), truncated], np.int64))
    for column in (texts, ends, hashes):
        column.flush()


def read(folder: pathlib.Path) -> Plan:
    """Maps a plan of `write`."""
    texts, ends, hashes = (
        np.asarray(np.load(_path(folder, name), mmap_mode="r"))
        for name in ("texts", "ends", "hashes")
    )
    lengths, counts, tokens, numbers = (
        np.load(_path(folder, name)) for name in ("lengths", "counts", "tokens", "numbers")
    )
    last = np.cumsum(counts).tolist()
    ranges = [range(end - count, end) for count, end in zip(counts.tolist(), last, strict=True)]
    units = [
        UnitOfWork(length, _Texts(texts, ends, own), total, hashes[own.start : own.stop])
        for length, total, own in zip(lengths.tolist(), tokens.tolist(), ranges, strict=True)
    ]
    return Plan(units, *numbers.tolist())


def _by_length(part: Part) -> Iterator[tuple[int, np.ndarray]]:
    """Each padded length, and the rows that have it."""
    for length in np.unique(part.lengths).tolist():
        yield length, np.flatnonzero(part.lengths == length)


def _sizes(part: Part) -> np.ndarray:
    """Bytes of each text."""
    return np.diff(part.ends, prepend=0)


def _starts(numbers: dict[int, int], lengths: Sequence[int]) -> dict[int, int]:
    """For each length the sum of the numbers before it."""
    sums = np.cumsum([0, *(numbers[length] for length in lengths)]).tolist()
    return dict(zip(lengths, sums[:-1], strict=True))


def _units(
    length: int, tokens: np.ndarray, unit_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, numbers of captions and tokens of the units of a length."""
    starts = np.arange(0, len(tokens), unit_size)
    counts = np.diff(starts, append=len(tokens))
    totals = np.add.reduceat(tokens.astype(np.int64), starts)
    return np.full(len(starts), length, np.int64), counts.astype(np.int64), totals


def _column(folder: pathlib.Path, name: str, dtype: Any, count: int) -> np.memmap:
    return np.lib.format.open_memmap(_path(folder, name), "w+", np.dtype(dtype), (count,))


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / f"{name}.npy"


class _Texts(Sequence[str]):
    """Texts in a column of bytes, decoded when they are read."""

    def __init__(self, texts: np.ndarray, ends: np.ndarray, rows: range) -> None:
        self._texts, self._ends, self._rows = texts, ends, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _Texts(self._texts, self._ends, self._rows[i])
        row = self._rows[i]
        start = int(self._ends[row - 1]) if row else 0
        return self._texts[start : int(self._ends[row])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
