"""List scheduling of a compiled program: what runs beside its collectives (step_time.py)."""

from __future__ import annotations

import dataclasses
import heapq
import math

from imagen_jax.parallel import instructions, links, peaks
from imagen_jax.parallel.instructions import Instruction, Program
from imagen_jax.planning.clock import COLLECTIVE, START, Clock, Network, Scope


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


class Beside(Clock):
    """As `Clock`, but operations that wait for a collective are deferred."""

    def __init__(
        self,
        program: Program,
        peak: peaks.Peaks,
        network: Network,
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

    def _steps(self, body: list[Instruction], scope: Scope) -> None:
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

    def _resume(self, body: list[Instruction], scope: Scope) -> None:
        """Waits until the first of the deferred operations can run, and runs what can."""
        self._wait(self._schedule.later[0][0])
        self._proceed(body, scope)

    def _proceed(self, body: list[Instruction], scope: Scope) -> None:
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
        match = COLLECTIVE.match(one.opcode)
        starts = match and match[2] != "-done"
        inside = START.match(one.opcode) and self._inside(one)
        return max(instructions.hbm_bytes(one.result), 1) if starts or inside else 0

    def _step(self, one: Instruction, scope: Scope) -> None:
        schedule = self._schedule
        needed = schedule.awaited(one)
        if one.opcode in instructions.FREE or self._ends(one):
            schedule.computed[one.name] = schedule.exist(one)
            schedule.pending[one.name] = needed
        elif self._collective_bytes(one):
            match = COLLECTIVE.match(one.opcode)
            kind, line = self._inside(one) or (str(match and match[1]), one.line)
            self._start(one, kind, line, schedule.exist(one))
        else:
            super()._step(one, scope)
            schedule.computed[one.name] = self.now
            for index in needed:
                self._results[index].used = min(self._results[index].used, self.now)

    def _fused(self, one: Instruction, scope: Scope) -> None:
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
