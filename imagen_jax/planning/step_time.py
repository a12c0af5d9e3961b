"""Predicted time of a compiled program: what its schedule takes at the chip's peaks.

Every operation takes the larger of FLOPs / peak and bytes / bandwidth of HBM; operations run one
after the other in the order of the compiled text. A collective takes the time of its bytes on the
links of the torus (parallel/links.py), and a microsecond per hop. Between its start and its end
other operations run; what remains at its end is exposed. On TPUs the prediction is a lower bound:
no operation reaches a peak, and elementwise work, start-up of operations and padding of arrays are
left out. On a CPU, with measured peaks, all but the padding of arrays counts.

A program that was compiled quickly waits for each collective where it starts. What a scheduler can
hide is estimated by a second pass (`exposed_beside`), list scheduling in the order of the text: a
collective starts when its operands are computed, the links are free and its result has room; an
operation that needs a result that does not exist yet is deferred, and the device runs those that
follow until it does. The room, `ahead`, is the bytes of collectives' results not yet used; results
of the operations that run meanwhile are not counted.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from imagen_jax.parallel import hlo, instructions, links, peaks
from imagen_jax.parallel.instructions import Instruction, Program
from imagen_jax.parallel.topology import Slice

_CHANNEL = re.compile(r"channel_id=(\d+)")
_COLLECTIVE = re.compile(rf"^({'|'.join(hlo.KINDS)})(-start|-done)?$")
_START = re.compile(r"^(copy|slice|async)-start$")


class StepTime(NamedTuple):
    """Seconds of one run of a program on one device.

    Attributes:
      products: operations with matrix products or convolutions.
      others: all other operations on the device.
      exposed: waiting for collectives.
      hidden: collectives while other operations run.
      exposed_beside: waiting for collectives if each ran beside the operations that do not need it.
      between_slices: sending over the data-centre network, taken as hidden.
    """

    products: float
    others: float
    exposed: float
    hidden: float
    exposed_beside: float
    between_slices: float

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return max(self.products + self.others + self.exposed, self.between_slices)

    @property
    def seconds_beside(self) -> float:
        """Of the whole run, if each collective ran beside the operations that do not need it."""
        return max(self.products + self.others + self.exposed_beside, self.between_slices)


def predict(
    text: str,
    peak: peaks.Peaks,
    *,
    devices: int = 1,
    torus: links.Torus | None = None,
    unknown_trips: int = 1,
    ahead: float = math.inf,
) -> StepTime:
    """The predicted time of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      peak: of one device.
      devices: of the whole mesh, for collectives over all.
      torus: their positions; None: every group of devices is a ring.
      unknown_trips: iterations of a loop whose bounds are arguments.
      ahead: bytes of collectives' results that are not yet used, for `exposed_beside`.
    """
    program = instructions.parse(text)
    sent = sum(send.count * send.bytes for send in hlo.sends(text))
    network = _Network(devices, torus)
    clock = _Clock(program, peak, network, unknown_trips)
    clock.run(program.entry)
    beside = _Beside(program, peak, network, unknown_trips, ahead)
    beside.run(program.entry)
    entry = program.computations[program.entry]
    returned = next(one.result for one in entry if one.line.lstrip().startswith("ROOT "))
    calling = peak.argument * sum(one.opcode == "parameter" for one in entry)
    calling += peak.result * len(instructions.shapes(returned))
    return StepTime(
        clock.products,
        clock.others + calling,
        clock.exposed,
        max(0.0, round(clock.busy - clock.exposed, 12)),  # Sums of the same times may differ.
        beside.exposed,
        sent / peak.dcn if sent else 0.0,
    )


def of_slice(
    text: str, where: Slice, mesh: Iterable[Any], unknown_trips: int, peak_bytes: int
) -> StepTime | None:
    """`predict` for the devices of a slice; None if their bandwidths are unknown.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      where: the slice.
      mesh: its devices in the order of the program's mesh.
      unknown_trips: as for `predict`.
      peak_bytes: memory of the program per chip. `ahead` is half of what it leaves free; the other
        half is for results of operations that run before their turn.
    """
    peak = peaks.of(where.devices[0].device_kind)
    per_chip = len(where.devices) // where.chips
    return peak and predict(
        text,
        peak,
        devices=len(where.devices),
        torus=links.torus(mesh),
        unknown_trips=unknown_trips,
        ahead=max(0.0, where.hbm - peak_bytes) / 2.0 / per_chip,
    )


class _Network(NamedTuple):
    devices: int
    torus: links.Torus | None


class _Scope(NamedTuple):
    """What the instructions of a computation share.

    Attributes:
      results: result types by name.
      last: channel -> name of the last fusion on it.
      ends: started instruction, or channel -> when it ends.
    """

    results: dict[str, str]
    last: dict[str, str]
    ends: dict[str, float]


class _Clock:
    """Runs computations in order; `now` is the time of the device."""

    def __init__(self, program: Program, peak: peaks.Peaks, network: _Network, unknown_trips: int):
        self._program, self._peak, self._network = program, peak, network
        self._unknown_trips = unknown_trips
        self.now = self.products = self.others = self.exposed = self.busy = 0.0
        self._free = {"ici": 0.0, "hbm": 0.0}  # When the links and the copies become free.

    def run(self, name: str) -> None:
        """Adds the time of a computation."""
        body = self._program.computations.get(name, [])
        last = {channel: one.name for one in body for channel in self._channels(one)}
        self._steps(body, _Scope({one.name: one.result for one in body}, last, {}))

    def _steps(self, body: list[Instruction], scope: _Scope) -> None:
        for one in body:
            self._step(one, scope)

    def _step(self, one: Instruction, scope: _Scope) -> None:
        ends = scope.ends
        kind = _COLLECTIVE.match(one.opcode)
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
        elif _START.match(one.opcode):
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

    def _fused(self, one: Instruction, scope: _Scope) -> None:
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
                kind = _COLLECTIVE.match(inner.opcode)
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


@dataclasses.dataclass
class _Result:
    """Of a collective that runs beside others: its size, when it exists and has been used."""

    bytes: int
    end: float
    used: float = math.inf


@dataclasses.dataclass
class _Schedule:
    """List scheduling of one computation.

    Attributes:
      begin: when it starts.
      computed: when results exist, by name.
      pending: collectives that a result awaits, by name.
      deferred: operations that wait, by name.
      blocked: name of a deferred operation -> places of those that need its result.
      later: when operations can run whose operands have a time, and their places.
      able: places of operations that can run now.
    """

    begin: float
    computed: dict[str, float] = dataclasses.field(default_factory=dict)
    pending: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    deferred: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    blocked: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    later: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    able: list[int] = dataclasses.field(default_factory=list)

    def exist(self, one: Instruction) -> float:
        """When the operands of an operation exist."""
        return max((self.computed.get(name, self.begin) for name in one.operands), default=0.0)

    def awaited(self, one: Instruction) -> set[int]:
        """The collectives that an operation needs."""
        return {index for name in one.operands for index in self.pending.get(name, ())}


class _Beside(_Clock):
    """As `_Clock`, but operations that wait for a collective are deferred."""

    def __init__(
        self,
        program: Program,
        peak: peaks.Peaks,
        network: _Network,
        unknown_trips: int,
        ahead: float,
    ):
        super().__init__(program, peak, network, unknown_trips)
        self._ahead = ahead
        self._results: list[_Result] = []
        self._schedule = _Schedule(0.0)

    def run(self, name: str) -> None:
        """Adds the time of a computation, which ends when its collectives do."""
        outer, self._schedule = self._schedule, _Schedule(self.now)
        first = len(self._results)
        super().run(name)
        for result in self._results[first:]:
            self._wait(result.end)
        self._schedule = outer

    def _steps(self, body: list[Instruction], scope: _Scope) -> None:
        schedule = self._schedule
        for place, one in enumerate(body):
            size = self._collective_bytes(one)
            while size and schedule.later and self._held() + size > self._ahead:
                self._resume(body, scope)
            schedule.deferred[one.name] = one
            self._add(place, one)
            self._proceed(body, scope)
        while schedule.later:
            self._resume(body, scope)

    def _add(self, place: int, one: Instruction) -> None:
        """Takes an operation up, behind a deferred one or with the time at which it can run."""
        schedule = self._schedule
        behind = next((name for name in one.operands if name in schedule.deferred), None)
        if behind is not None:
            schedule.blocked.setdefault(behind, []).append(place)
        elif self._is_at_once(one):
            heapq.heappush(schedule.able, place)
        else:
            heapq.heappush(schedule.later, (schedule.exist(one), place))

    def _resume(self, body: list[Instruction], scope: _Scope) -> None:
        """Waits until the first of the deferred operations can run, and runs what can."""
        self._wait(self._schedule.later[0][0])
        self._proceed(body, scope)

    def _proceed(self, body: list[Instruction], scope: _Scope) -> None:
        """Runs deferred operations, in order, until none can run now."""
        schedule = self._schedule
        while True:
            while schedule.later and schedule.later[0][0] <= self.now:
                heapq.heappush(schedule.able, heapq.heappop(schedule.later)[1])
            if not schedule.able:
                return
            one = body[heapq.heappop(schedule.able)]
            self._step(one, scope)
            del schedule.deferred[one.name]
            for place in schedule.blocked.pop(one.name, ()):
                self._add(place, body[place])

    def _is_at_once(self, one: Instruction) -> bool:
        """Whether an instruction takes no time of the device."""
        return one.opcode in instructions.FREE or self._ends(one) or self._collective_bytes(one) > 0

    def _ends(self, one: Instruction) -> bool:
        """Whether an instruction is the end of a collective."""
        return one.opcode.endswith("-done") and one.opcode not in ("copy-done", "slice-done")

    def _collective_bytes(self, one: Instruction) -> int:
        """Size of the result of a collective that an instruction starts; 0: it starts none."""
        match = _COLLECTIVE.match(one.opcode)
        starts = match and match[2] != "-done"
        inside = _START.match(one.opcode) and self._inside(one)
        return max(instructions.hbm_bytes(one.result), 1) if starts or inside else 0

    def _step(self, one: Instruction, scope: _Scope) -> None:
        schedule = self._schedule
        needed = schedule.awaited(one)
        if one.opcode in instructions.FREE or self._ends(one):
            schedule.computed[one.name] = schedule.exist(one)
            schedule.pending[one.name] = needed
        elif self._collective_bytes(one):
            match = _COLLECTIVE.match(one.opcode)
            kind, line = self._inside(one) or (str(match and match[1]), one.line)
            self._start(one, kind, line, schedule.exist(one))
        else:
            super()._step(one, scope)
            schedule.computed[one.name] = self.now
            for index in needed:
                self._results[index].used = min(self._results[index].used, self.now)

    def _fused(self, one: Instruction, scope: _Scope) -> None:
        """A fusion with collectives: alone, or the start, a step or the end of some."""
        self._compute(one, scope.results)
        for channel, collective in self._collectives(one).items():
            if scope.last[channel] == one.name:
                self._start(one, *collective, self.now)

    def _start(self, one: Instruction, kind: str, line: str, ready: float) -> None:
        """Starts a collective when its operands are computed, at most `ahead` of its place."""
        devices, torus = self._network
        seconds = links.seconds(kind, line, self._peak, devices=devices, where=torus)
        size = instructions.hbm_bytes(one.result)
        begin = max(ready, self._free["ici"], min(self.now, self._room(size)))
        self._free["ici"] = begin + seconds
        self.busy += seconds
        self._results.append(_Result(size, begin + seconds))
        self._schedule.pending.setdefault(one.name, set()).add(len(self._results) - 1)
        self._schedule.computed[one.name] = begin + seconds

    def _held(self) -> int:
        """Bytes of the results of collectives that deferred operations await."""
        awaited = map(self._schedule.awaited, self._schedule.deferred.values())
        return sum(self._results[index].bytes for index in set().union(*awaited))

    def _room(self, size: int) -> float:
        """When results before one of `size` bytes have been used, so that it has room."""
        if size > self._ahead:
            return math.inf
        held = size
        for result in reversed(self._results):
            held += result.bytes
            if held > self._ahead:
                return result.used
        return 0.0
