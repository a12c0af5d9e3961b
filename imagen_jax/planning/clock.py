"""Runs a compiled program in the order of its text, and adds up the time (step_time.py)."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from imagen_jax.parallel import hlo, instructions, links, peaks
from imagen_jax.parallel.instructions import Instruction, Program

_CHANNEL = re.compile(r"channel_id=(\d+)")
COLLECTIVE = re.compile(rf"^({'|'.join(hlo.KINDS)})(-start|-done)?$")
START = re.compile(r"^(copy|slice|async)-start$")


class Network(NamedTuple):
    """The number of devices of a mesh, and their positions; None: every group is a ring."""

    devices: int
    torus: links.Torus | None


class Scope(NamedTuple):
    """What the instructions of a computation share.

    Attributes:
      results: result types by name.
      last: channel -> name of the last fusion on it.
      ends: started instruction, or channel -> when it ends.
    """

    results: dict[str, str]
    last: dict[str, str]
    ends: dict[str, float]


class Clock:
    """Runs computations in order; `now` is the time of the device."""

    def __init__(self, program: Program, peak: peaks.Peaks, network: Network, unknown_trips: int):
        self._program, self._peak, self._network = program, peak, network
        self._unknown_trips = unknown_trips
        self.now = self.products = self.others = self.exposed = self.busy = 0.0
        self._free = {"ici": 0.0, "hbm": 0.0}  # When the links and the copies become free.

    def run(self, name: str) -> None:
        """Adds the time of a computation."""
        body = self._program.computations.get(name, [])
        last = {channel: one.name for one in body for channel in self._channels(one)}
        self._steps(body, Scope({one.name: one.result for one in body}, last, {}))

    def _steps(self, body: list[Instruction], scope: Scope) -> None:
        for one in body:
            self._step(one, scope)

    def _step(self, one: Instruction, scope: Scope) -> None:
        ends = scope.ends
        kind = COLLECTIVE.match(one.opcode)
        if one.opcode == "while":
            self._loop(one)
        elif one.opcode == "conditional":
            self._branches(one)
        elif one.opcode == "call":
            for name in one.called:
                self.run(name)
        elif one.opcode in ("copy-done", "slice-done"):
            end = max(ends.get(one.operands[0], self.now), self.now)
            self.others += end - self.now
            self.now = end
        elif one.opcode.endswith("-done") and one.operands:
            self._wait(ends.get(one.operands[0], self.now))
        elif kind:
            end = self._communicate(kind[1], one.line)
            ends[one.name] = end
            if not kind[2]:
                self._wait(end)
        elif START.match(one.opcode):
            collective = self._inside(one)
            if collective:
                ends[one.name] = self._communicate(*collective)
            else:
                ends[one.name] = self._copy(one)
        elif self._channels(one):
            self._fused(one, scope)
        else:
            self._compute(one, scope.results)

    def _compute(self, one: Instruction, results: dict[str, str]) -> None:
        if one.opcode in instructions.FREE:
            return
        peak = self._peak
        work = self._products(one, results)
        plain, functions = instructions.elementwise(one, self._program, results)
        moved = instructions.traffic(one, self._program, results) / peak.hbm
        vector = plain / peak.plain + functions / peak.functions
        seconds = peak.start + max(work + vector, moved)
        self.now += seconds
        if work:
            self.products += seconds
        else:
            self.others += seconds

    def _products(self, one: Instruction, results: dict[str, str]) -> float:
        """Seconds of the products of an instruction."""
        peak = self._peak
        work = instructions.flops(one, self._program, results)
        if work and peak.windows < math.inf:
            copied = instructions.windows(one, self._program, results)
            if copied.elements:
                return copied.flops / peak.flops + copied.elements / peak.windows
        return work / peak.flops

    def _fused(self, one: Instruction, scope: Scope) -> None:
        """A fusion with collectives: alone, or the start, a step or the end of some."""
        found = self._collectives(one)
        for channel, collective in found.items():
            if channel not in scope.ends:
                scope.ends[channel] = self._communicate(*collective)
        self._compute(one, scope.results)
        for channel in found:
            if scope.last[channel] == one.name:
                self._wait(scope.ends[channel])

    def _communicate(self, kind: str, line: str) -> float:
        """Starts a collective; when it ends."""
        devices, torus = self._network
        seconds = links.seconds(kind, line, self._peak, devices=devices, where=torus)
        self.busy += seconds
        self._free["ici"] = max(self.now, self._free["ici"]) + seconds
        return self._free["ici"]

    def _copy(self, one: Instruction) -> float:
        """Starts a copy between memories; when it ends."""
        seconds = instructions.hbm_bytes(one.result) / self._peak.hbm
        self._free["hbm"] = max(self.now, self._free["hbm"]) + seconds
        return self._free["hbm"]

    def _wait(self, end: float) -> None:
        if end > self.now:
            self.exposed += end - self.now
            self.now = end

    def _loop(self, one: Instruction) -> None:
        before = self._totals()
        times = instructions.trips(one, self._program, self._unknown_trips)
        for name in one.called:
            self.run(name)
        self.now = before["now"] + times * (self.now - before["now"])
        for field in ("products", "others", "exposed", "busy"):
            total = before[field] + times * (getattr(self, field) - before[field])
            setattr(self, field, total)

    def _branches(self, one: Instruction) -> None:
        """The branch that takes longest."""
        before, longest = self._totals(), None
        for name in one.called:
            for field, value in before.items():
                setattr(self, field, value)
            self.run(name)
            if longest is None or self.now > longest["now"]:
                longest = self._totals()
        for field, value in (longest or before).items():
            setattr(self, field, value)

    def _totals(self) -> dict[str, float]:
        fields = ("now", "products", "others", "exposed", "busy")
        return {field: getattr(self, field) for field in fields}

    def _channels(self, one: Instruction) -> list[str]:
        """Channels of the collectives in a fusion."""
        return [] if one.opcode != "fusion" else list(self._collectives(one))

    def _inside(self, one: Instruction) -> tuple[str, str] | None:
        """Kind and line of the collective that an instruction calls."""
        return next(iter(self._collectives(one).values()), None)

    def _collectives(self, one: Instruction) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        for name in one.called:
            for inner in self._program.computations.get(name, []):
                kind = COLLECTIVE.match(inner.opcode)
                if kind:
                    scatter = name.startswith(hlo.SCATTER)
                    # Merged ones, which have no steps, may all have the same channel.
                    channel = None if scatter else _CHANNEL.search(inner.line)
                    found[channel[1] if channel else inner.name] = (
                        "reduce-scatter" if scatter else kind[1],
                        inner.line,
                    )
                found.update(self._collectives(inner))
        return found
