"""Time of a collective on the links between chips.

The chips of a slice are a torus: each axis that a group of devices spans carries its share of the
bytes at once. On an axis whose ends are linked a ring sends in both directions; on a part of an
axis, or one without that link, the outermost chip receives everything over one link (Austin et al.,
How to Scale Your Model, 2025, "Sharded matrices").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from imagen_jax.parallel import hlo
from imagen_jax.parallel.peaks import Peaks

_HOP_SECONDS = 1e-6


class Torus(NamedTuple):
    """Positions of devices.

    Attributes:
      positions: of each device, in the order of the mesh.
      sides: chips along each axis.
    """

    positions: tuple[tuple[int, ...], ...]
    sides: tuple[int, ...]


class Axis(NamedTuple):
    """An axis that a group spans: its chips along it, and over how many links one receives."""

    chips: int
    links: int

    @property
    def hops(self) -> float:
        """Links between the two devices furthest from each other."""
        return self.chips / 2 if self.links == 2 else float(self.chips - 1)


def torus(devices: Iterable[Any]) -> Torus | None:
    """The torus of devices in the order of the mesh; None if they have no positions."""
    positions = tuple(tuple(getattr(device, "coords", ())) for device in devices)
    if not positions or not all(positions):
        return None
    return Torus(positions, tuple(max(at) + 1 for at in zip(*positions, strict=True)))


def axes(group: Sequence[int], where: Torus | None, ring: int) -> list[Axis]:
    """Axes that a group spans; one ring of all its devices where their positions are unknown.

    Args:
      group: numbers of its devices in the mesh.
      where: positions of the mesh's devices.
      ring: chips along a side, or a multiple, from which on its ends are linked.
    """
    one_ring = [Axis(len(group), 2)]
    if where is None or max(group) >= len(where.positions):
        return one_ring
    found = list(zip(*(where.positions[device] for device in group), strict=True))
    spans = [len(set(at)) for at in found]
    if math.prod(spans) != len(group):  # No box, or over several slices.
        return one_ring
    return [
        Axis(span, 2 if span == side and side % ring == 0 else 1)
        for span, side in zip(spans, where.sides, strict=True)
        if span > 1
    ]


def seconds(
    kind: str, line: str, peak: Peaks, *, devices: int, where: Torus | None = None
) -> float:
    """Time of a collective.

    Args:
      kind: a row of hlo.KINDS.
      line: its instruction.
      peak: of one device.
      devices: of the whole mesh.
      where: their positions.
    """
    size = hlo.result_bytes(line, kind)
    if kind == "collective-permute":
        return size / peak.ici + _HOP_SECONDS
    group = hlo.first_group(line) or range(devices)
    if len(group) == 1:
        return 0.0
    spanned = axes(group, where, peak.ring)
    rate = sum(axis.links for axis in spanned) * peak.ici
    gathered = size * (len(group) - 1) / len(group) / rate
    if kind == "all-to-all":  # Half of the bytes cross the middle of an axis, over its links.
        taken = max(size * axis.chips / (4.0 * axis.links * peak.ici) for axis in spanned)
    else:
        taken = 2.0 * gathered if kind == "all-reduce" else gathered
    return taken + sum(axis.hops for axis in spanned) * _HOP_SECONDS
