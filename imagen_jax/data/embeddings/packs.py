"""Finished units of a large store in files of about a gigabyte.

A pack holds unit files one after the other, unchanged. The list beside it, a .json of the same
name, is written before the units are deleted, so every unit is always in one of the two. Which
units a pack holds depends on the plan alone.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imagen_jax.data.embeddings import unit_file
from imagen_jax.data.embeddings.unit_file import Unit
from imagen_jax.io import atomic

PACK_BYTES = 1 << 30
MAX_LOOSE = 1024  # Units that stay files of their own.


class PackedUnit(NamedTuple):
    """A unit in a pack: as in a manifest, and the offset of its first byte."""

    name: str
    sha256: str
    captions: int
    tokens: int
    start: int


class Pack(NamedTuple):
    """A pack as listed in the manifest: name, size in bytes, hash, numbers of its content."""

    file: str
    bytes: int
    sha256: str
    units: int
    captions: int
    tokens: int


class Finished:
    """Which units of a folder are finished, as files or in packs.

    Attributes:
      packed: names of the units in packs.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Reads the lists of the packs."""
        self._folder = folder
        self._lists: set[str] = set()
        self.packed: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Reads the lists of new packs."""
        for path in self._folder.glob("pack_*.json"):
            if path.name not in self._lists:
                self.packed |= {unit.name for unit in read_list(path)[1]}
                self._lists.add(path.name)

    def check(self, name: str) -> bool:
        """Whether a unit is finished by now."""
        self.refresh()
        return name in self

    def __contains__(self, name: str) -> bool:
        return name in self.packed or (self._folder / name).exists()


def pack(folder: pathlib.Path, names: Sequence[str]) -> Iterator[tuple[Pack, list[PackedUnit]]]:
    """Moves finished units into packs; yields every pack, those of an earlier call included.

    Args:
      folder: of the store.
      names: of the units, in the order of the plan.
    """
    at = number = 0
    while at < len(names):
        path = folder / f"pack_{number:06d}.bin"
        list_file = path.with_suffix(".json")
        found = read_list(list_file) if list_file.exists() else None
        # Of another plan, which has the same units only by chance.
        if found is None or [u.name for u in found[1]] != list(names[at : at + len(found[1])]):
            found = _write(path, folder, names[at:])
            content = [found[0]._asdict(), [list(unit) for unit in found[1]]]
            atomic.write_text(list_file, json.dumps(content))
        for unit in found[1]:
            (folder / unit.name).unlink(missing_ok=True)
        yield found
        at += len(found[1])
        number += 1


def read_list(path: pathlib.Path) -> tuple[Pack, list[PackedUnit]]:
    """A pack and its units, of the list beside it."""
    row, units = json.loads(path.read_text())
    return Pack(**row), [PackedUnit(*unit) for unit in units]


def _write(
    path: pathlib.Path, folder: pathlib.Path, names: Sequence[str]
) -> tuple[Pack, list[PackedUnit]]:
    """Writes the first of these units, about PACK_BYTES, to a pack."""
    units, digest, size = [], hashlib.sha256(), 0
    with atomic.file(path) as temporary, temporary.open("wb") as out:
        for name in names:
            unit: Unit = unit_file.describe_unit(folder / name)
            content = (folder / name).read_bytes()
            if units and size + len(content) > PACK_BYTES:
                break
            units.append(PackedUnit(*unit, start=size))
            digest.update(content)
            out.write(content)
            size += len(content)
    captions, tokens = sum(u.captions for u in units), sum(u.tokens for u in units)
    return Pack(path.name, size, digest.hexdigest(), len(units), captions, tokens), units
