"""The plan of `embed`, made by one worker and mapped by the others.

A plan sorts and tokenizes all captions, which takes longer than encoding a unit. The file holds the
texts in the order of the units as one column of bytes. It stays with the store, so that the same
command again needs no plan; a store of other captions removes it.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from imagen_jax.data.embeddings.claims import Claims
from imagen_jax.data.embeddings.unit_file import caption_hash
from imagen_jax.io import atomic

_PREFIX = ".plan_"
_POLL_EVERY = 0.2  # Seconds between checks for the plan of another worker.


class UnitOfWork(NamedTuple):
    """A unit to encode: padded length in tokens, captions, number of real tokens."""

    length: int
    captions: Sequence[str]
    tokens: int


class Plan(NamedTuple):
    """All units, with counts of distinct captions, tokens and truncated captions."""

    units: list[UnitOfWork]
    unique: int
    tokens: int
    truncated: int


def get(
    folder: pathlib.Path,
    captions: Sequence[str],
    settings: dict[str, Any],
    *,
    make: Callable[[], Plan],
    patience: float,
) -> Plan:
    """The plan of all workers: that of the file, or a new one, which becomes the file.

    Args:
      folder: of the store.
      captions: to embed, in any order.
      settings: of which the plan depends.
      make: makes the plan.
      patience: seconds without a sign of life after which another worker makes it.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(np.unique([caption_hash(caption) for caption in captions]).tobytes())
    name = f"{_PREFIX}{digest.hexdigest()[:16]}"
    with Claims(folder, patience) as claims:
        for path in folder.glob(f"{_PREFIX}*"):
            if path.suffix == "" and path.name != name:  # No claim.
                path.unlink(missing_ok=True)
        while not (folder / name).exists():
            if not claims.take(name[1:]):
                time.sleep(_POLL_EVERY)
                continue
            if not (folder / name).exists():
                _write(folder / name, make())
            claims.release(name[1:])
    return _read(folder / name)


def _write(path: pathlib.Path, plan: Plan) -> None:
    texts = [text.encode("utf-8", "surrogatepass") for unit in plan.units for text in unit.captions]
    columns = {
        "texts": np.frombuffer(b"".join(texts), np.uint8),
        "ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "counts": np.array([len(unit.captions) for unit in plan.units], np.int64),
        "lengths": np.array([unit.length for unit in plan.units], np.int64),
        "tokens": np.array([unit.tokens for unit in plan.units], np.int64),
        "numbers": np.array([plan.unique, plan.tokens, plan.truncated], np.int64),
    }
    with atomic.file(path) as temporary:
        save_file(columns, temporary)


def _read(path: pathlib.Path) -> Plan:
    with safe_open(path, framework="np") as file:
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    texts, ends = columns["texts"], columns["ends"]
    last = np.cumsum(columns["counts"]).tolist()
    units = [
        UnitOfWork(length, _Texts(texts, ends, range(end - count, end)), tokens)
        for length, tokens, count, end in zip(
            *(columns[name].tolist() for name in ("lengths", "tokens", "counts")), last, strict=True
        )
    ]
    return Plan(units, *columns["numbers"].tolist())


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
