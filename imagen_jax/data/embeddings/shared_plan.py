"""The plan of `embed`, made by one worker, or by a Beam pipeline, and mapped by the others.

A plan sorts and tokenizes all captions, which takes longer than encoding a unit. It stays with the
store (`plan_file.py`), so that the same command again needs no plan; a store of other captions
removes it.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from imagen_jax.data.embeddings import plan_file
from imagen_jax.data.embeddings.claims import Claims
from imagen_jax.data.embeddings.plan_file import Plan
from imagen_jax.data.embeddings.unit_file import caption_hash
from imagen_jax.io import atomic

_PREFIX = ".plan_"
_POLL_EVERY = 0.2  # Seconds between checks for the plan of another worker.


@runtime_checkable
class Captioned(Protocol):
    """Records with captions."""

    fingerprint: str
    further_captions: tuple[str, ...]

    def __len__(self) -> int: ...

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i."""
        ...

    def hash_blocks(self) -> Iterator[np.ndarray]:
        """One hash per caption, in blocks."""
        ...


class SourceCaptions:
    """All captions of a source and its further ones, read when they are iterated.

    Attributes:
      fingerprint: of the captions.
    """

    def __init__(self, source: Captioned) -> None:
        self._source = source
        self.fingerprint = f"{source.fingerprint} {source.further_captions}"

    def __len__(self) -> int:
        return sum(len(block) for block in self._source.hash_blocks())

    def __iter__(self) -> Iterator[str]:
        for i in range(len(self._source)):
            yield from self._source.captions(i)
        yield from self._source.further_captions


AnyCaptions = Sequence[str] | SourceCaptions


def path_of(folder: pathlib.Path, captions: AnyCaptions, settings: dict[str, Any]) -> pathlib.Path:
    """The folder of the plan of a store, whether it exists or not; arguments as of `get`."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if isinstance(captions, SourceCaptions):
        digest.update(captions.fingerprint.encode("utf-8", "surrogatepass"))
    else:
        digest.update(np.unique([caption_hash(caption) for caption in captions]).tobytes())
    return folder / f"{_PREFIX}{digest.hexdigest()[:16]}"


def get(
    folder: pathlib.Path,
    captions: AnyCaptions,
    settings: dict[str, Any],
    *,
    make: Callable[[pathlib.Path], None],
    patience: float,
) -> Plan:
    """The plan of all workers: the one that exists, or a new one.

    Args:
      folder: of the store.
      captions: to embed, in any order.
      settings: of which the plan depends.
      make: writes the plan into a folder.
      patience: seconds without a sign of life after which another worker makes it.
    """
    path = path_of(folder, captions, settings)
    with Claims(folder, patience) as claims:
        for other in folder.glob(f"{_PREFIX}*"):
            if other.suffix == "" and other != path:  # No claim.
                _remove(other)
        while not path.exists():
            if not claims.take(path.name[1:]):
                time.sleep(_POLL_EVERY)
                continue
            if not path.exists():
                with atomic.folder(path, replace=False) as temporary:
                    make(temporary)
            claims.release(path.name[1:])
    return plan_file.read(path)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:  # Of an earlier version.
        path.unlink(missing_ok=True)
