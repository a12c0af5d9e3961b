"""Collective operations of a compiled program, parsed from its HLO text.

A program is a list of computations. The body of a `while` is counted once per iteration, unlike in
the compiler's cost analysis.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from imagen_jax.parallel import instructions
from imagen_jax.parallel.instructions import Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(
    rf"= (.*?) ({'|'.join(KINDS)}|ragged-all-to-all|collective-broadcast)(?:-start)?\(%"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUP = re.compile(r"replica_groups=\{\{([\d,]+)\}")
# Groups of this shape, filled by counting through an array of another shape, transposed.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_COUNTED = re.compile(rf"replica_groups=\[(\d+),(\d+)\]<={_IOTA}")
# Groups by axes of the mesh: their sizes, the order of its devices, the axes that a group spans.
_MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?[^{{]*\{{([^}}]*)\}}"
)
# What crosses the data-centre network is a send to the host's Megascale runtime, whose rendezvous
# names the operation. libtpu splits an all-reduce over several slices into a reduce-scatter and an
# all-gather within each slice, which are counted as such, and sends between slices.
_SEND = re.compile(
    r"= \((.*?), .* send\(.*handler_name=\"xla_megascale_runtime\""
    r".*_transfer_rendezvous=\"([a-z\-]+)"
)
_OP_NAME = re.compile(r'op_name="([^"]+)"')
# On TPUs a reduce-scatter is a fusion of this name around an all-reduce and a slice.
SCATTER = "all-reduce-scatter"


class Send(NamedTuple):
    """A transfer from one device over the data-centre network, in one run of a program.

    Attributes:
      kind: the operation that it is part of, such as all-reduce.
      op_name: JAX's name of what is sent: "transpose(" in it means a gradient; "" if unknown.
      result: type of what is sent, such as bf16[64,8,128].
      bytes: its size.
      count: number of times.
    """

    kind: str
    op_name: str
    result: str
    bytes: int
    count: int

    @property
    def is_gradient(self) -> bool:
        """Whether it is part of the backward pass."""
        return "transpose(" in self.op_name


class Collective(NamedTuple):
    """All collective operations of one kind in one run of a program, on one device.

    Attributes:
      kind: a row of KINDS.
      count: number of operations.
      bytes: over ICI, size of their results; for a reduce-scatter, of its input. Over DCN, bytes
        that the device sends.
      network: "ici", within a slice, or "dcn", between slices.
    """

    kind: str
    count: int
    bytes: int
    network: str = "ici"


def collectives(text: str, unknown_trips: int = 1) -> list[Collective]:
    """The collective operations of a compiled program by kind; loop bodies once per iteration.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      unknown_trips: iterations of a loop whose bounds are arguments.
    """
    program = instructions.parse(text)
    # (kind, location) -> instruction -> (count, bytes). On TPUs an operation that overlaps with
    # others consists of several fusions on one channel: start, steps and end.
    found: dict[tuple[str, str], dict[str, tuple[int, int]]] = collections.defaultdict(dict)

    def visit(name: str, times: int, fused: bool) -> None:
        for one in program.computations.get(name, ()):
            line = one.line
            match = _COLLECTIVE.search(line)
            if match:
                scatter = name.startswith(SCATTER)
                kind = "reduce-scatter" if scatter else match[2]
                channel = _CHANNEL.search(line)
                location = channel[0] if channel and fused and not scatter else f"{name}: {line}"
                same = found[kind, location]
                before = same.get(line, (0, 0))[0]
                same[line] = before + times, _bytes(match[1], kind, line)
                continue
            inner = times * instructions.trips(one, program, unknown_trips)
            for called in one.called:
                visit(called, inner, one.opcode == "fusion")

    visit(program.entry, 1, False)
    count: dict[str, int] = collections.Counter()
    size: dict[str, int] = collections.Counter()
    for (kind, _), same in found.items():
        times, each = max(same.values())
        count[kind] += times
        size[kind] += times * each
    between = sends(text)
    return [Collective(kind, count[kind], size[kind]) for kind in sorted(count)] + [
        Collective(
            kind,
            sum(send.count for send in between if send.kind == kind),
            sum(send.count * send.bytes for send in between if send.kind == kind),
            network="dcn",
        )
        for kind in sorted({send.kind for send in between})
    ]


def sends(text: str) -> list[Send]:
    """What a device of a program over several slices sends over the data-centre network.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    """
    program = instructions.parse(text)
    found = []

    def visit(name: str, times: int) -> None:
        body = program.computations.get(name, [])
        for one in body:
            send = _SEND.search(one.line)
            if send:
                size = sum(instructions.sizes(send[1]))
                result = send[1].partition("{")[0]
                found.append(Send(send[2], _op_name(one, body), result, size, times))
                continue
            for called in one.called:
                visit(called, times * instructions.trips(one, program))

    visit(program.entry, 1)
    return found


def _op_name(one: Instruction, body: list[Instruction]) -> str:
    """JAX's name of an instruction, or of the nearest one whose result it uses."""
    defined = {other.name: other for other in body}
    pending, seen = [one], set()
    while pending:
        current = pending.pop(0)
        name = _OP_NAME.search(current.line)
        if name:
            return name[1]
        for operand in current.operands:
            if operand in defined and operand not in seen:
                seen.add(operand)
                pending.append(defined[operand])
    return ""


def group_size(line: str) -> int:
    """Devices in each group of a collective; 0 if the group is all devices."""
    return len(first_group(line))


def first_group(line: str) -> tuple[int, ...]:
    """Numbers of the devices of a collective's first group; () if the group is all devices."""
    listed, counted, mesh = (form.search(line) for form in (_GROUP, _COUNTED, _MESH))
    if listed:
        return tuple(map(int, listed[1].split(",")))
    if counted:
        groups = _order(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))
        return tuple(groups[0].tolist())
    if mesh:
        sizes = dict(axis.split("=") for axis in mesh[1].split(","))
        spanned = mesh[4].split(",")
        shape = [int(size) for size in sizes.values()]
        order = _order(mesh[2] or str(math.prod(shape)), mesh[3]).reshape(shape)
        at = tuple(slice(None) if axis in spanned else 0 for axis in sizes)
        return tuple(order[at].ravel().tolist())
    return ()


def _order(shape: str, permutation: str | None) -> np.ndarray:
    """0, 1, ... counted through an array of this shape, then transposed."""
    sizes = [int(size) for size in shape.split(",")]
    counted = np.arange(math.prod(sizes)).reshape(sizes)
    return counted.transpose(
        [int(axis) for axis in permutation.split(",")] if permutation else None
    )


def result_bytes(line: str, kind: str) -> int:
    """Bytes of a collective's result; of a reduce-scatter's input."""
    match = _COLLECTIVE.search(line)
    return _bytes(match[1], kind, line) if match else 0


def _bytes(result: str, kind: str, line: str) -> int:
    """Bytes of a result type; the result of an asynchronous start also contains its input."""
    sizes = instructions.sizes(result)
    if f"{kind}-start(" in line and len(sizes) > 1:
        return max(sizes)
    if f" {kind}(" in line and kind == "reduce-scatter":
        return sum(sizes) * max(group_size(line), 1)
    return sum(sizes)
