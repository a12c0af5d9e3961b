"""What changed in the data since a run: images added, removed or replaced, captions corrected.

Indexes of earlier states of a folder stay in its cache, so a fingerprint finds the records that a
run was trained on.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from imagen_jax.data.index import scan
from imagen_jax.data.index.indexed_source import IndexedSource
from imagen_jax.data.index.table import Table
from imagen_jax.data.sources.mixture import Mixture
from imagen_jax.data.sources.records import AnySource


class Changes(NamedTuple):
    """Numbers of images."""

    added: int = 0
    removed: int = 0
    replaced: int = 0
    captions: int = 0

    def __str__(self) -> str:
        return (
            f"{self.added:,} images added, {self.removed:,} removed, {self.replaced:,} replaced, "
            f"{self.captions:,} with other captions"
        )


def since(source: AnySource, fingerprint: str) -> Changes | None:
    """What changed since the source had a fingerprint; None: the index of then is gone."""
    if isinstance(source, Mixture):
        before = fingerprint.split("+")
        parts = list(source.sources.values())
        if len(before) != len(parts):
            return None
        found = [since(part, old) for part, old in zip(parts, before, strict=True)]
        known = [change for change in found if change is not None]
        if len(known) < len(found):
            return None
        return Changes(*(sum(numbers) for numbers in zip(*known, strict=True)))
    if source.fingerprint == fingerprint:
        return Changes()
    if not isinstance(source, IndexedSource):
        return None
    old = _find(source.cache, fingerprint)
    return None if old is None else compare(old, source.table)


def compare(old: Table, new: Table) -> Changes:
    """The differences of two tables, record by record."""
    before, after = _records(old), _records(new)
    common = before.keys() & after.keys()
    return Changes(
        added=len(after) - len(common),
        removed=len(before) - len(common),
        replaced=sum(before[key][0] != after[key][0] for key in common),
        captions=sum(before[key][1] != after[key][1] for key in common),
    )


def _records(table: Table) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Size and captions by key."""
    return {table.key(i): (table.size(i), table.captions(i)) for i in range(len(table))}


def _find(cache: pathlib.Path, fingerprint: str) -> Table | None:
    """The cached index with a fingerprint."""
    for found, load in scan.read_indexes(cache):
        if found == fingerprint:
            return load()
    return None
