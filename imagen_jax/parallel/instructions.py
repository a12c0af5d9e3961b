"""Instructions of a compiled program, parsed from its HLO text, with their FLOPs and bytes.

A program is a list of computations. Those of TPUs and GPUs are scheduled: the instructions of a
computation run in the order of the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"(pred|bf16|[suf]\d+)(?:e\d\w*)?\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= [su]\d+\[\][^ ]* constant\((\d+)\)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
# A layout in another memory space than HBM, such as a TPU's vector memory, S(1).
_ON_CHIP = re.compile(r"S\([1-9]\)")
# Instructions that only name values.
FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
    + ("partition-id", "replica-id", "optimization-barrier")
)
_PLAIN = frozenset(
    ("add", "subtract", "multiply", "divide", "maximum", "minimum", "compare", "select", "negate")
    + ("abs", "convert", "and", "or", "xor", "not", "clamp", "floor", "ceil", "sign", "is-finite")
    + ("round-nearest-even", "shift-left", "shift-right-logical", "shift-right-arithmetic")
)
_FUNCTIONS = frozenset(
    ("exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "erf")
    + ("rsqrt", "sqrt", "cbrt", "power", "sine", "cosine", "tan", "atan2", "remainder")
)
_READS_A_PART = frozenset(("dynamic-slice", "slice", "gather"))


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: unique in its program.
      result: type of its result, such as `bf16[8,128]{1,0}` or a tuple of them.
      opcode: such as fusion.
      operands: names of the instructions whose results it uses.
      called: computations that it runs.
      line: its text.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    line: str


class Program(NamedTuple):
    """All computations of a program.

    Attributes:
      computations: name -> instructions, in order.
      entry: name of the computation that runs first.
    """

    computations: dict[str, list[Instruction]]
    entry: str


class Windows(NamedTuple):
    """Windows of convolutions, zeros of padding and dilation included.

    Attributes:
      elements: of all windows.
      flops: of the products with them.
    """

    elements: float
    flops: float


def parse(text: str) -> Program:
    """The program of `jax.stages.Compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations[head[1]] = []
            entry = head[1] if line.startswith("ENTRY") else entry
        elif " = " in line:
            found = _instruction(line)
            if found:
                current.append(found)
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if not name:
        return None
    begin = name.end()
    end = _closing(line, begin) if line[begin] == "(" else line.find(" ", begin)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    operands = line[opcode.end() : _closing(line, opcode.end() - 1)]
    branches = _BRANCHES.search(line)
    called = _CALLED.findall(line) + (_OPERAND.findall(branches[1]) if branches else [])
    return Instruction(
        name[1], line[begin:end], opcode[1], tuple(_OPERAND.findall(operands)), tuple(called), line
    )


def _closing(line: str, begin: int) -> int:
    """Position after the parenthesis that closes the one at `begin`."""
    depth = 0
    for position in range(begin, len(line)):
        depth += (line[position] == "(") - (line[position] == ")")
        if depth == 0:
            return position + 1
    return len(line)


def shapes(result: str) -> list[tuple[int, ...]]:
    """Shapes of the arrays of a result type."""
    return [tuple(int(d) for d in dims.split(",") if d) for _, dims, _ in _ARRAY.findall(result)]


def sizes(result: str, *, on_chip: bool = True) -> list[int]:
    """Bytes of the arrays of a result type; without on_chip, 0 for those in a chip's own memory."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(result):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        elements = math.prod(int(d) for d in dims.split(",") if d)
        found.append(elements * bits // 8 if on_chip or not _ON_CHIP.search(layout) else 0)
    return found


def hbm_bytes(result: str) -> int:
    """Bytes of a result type in HBM; those in a chip's own memory do not count."""
    return sum(sizes(result, on_chip=False))


def trips(instruction: Instruction, program: Program, unknown: int = 1) -> int:
    """How often an instruction runs what it calls.

    Iterations of a `while`: its known trip count, or the bound of its condition, or `unknown`; 1
    for every other instruction.
    """
    condition = _CONDITION.search(instruction.line)
    if instruction.opcode != "while" or not condition:
        return 1
    known = _TRIPS.search(instruction.line)
    if known:
        return int(known[1])
    body = program.computations.get(condition[1], [])
    bounds = [_CONSTANT.search(one.line) for one in body]
    return max((int(bound[1]) for bound in bounds if bound), default=unknown)


def flops(instruction: Instruction, program: Program, results: Mapping[str, str]) -> float:
    """FLOPs of matrix products and convolutions, in called computations too.

    Args:
      instruction: not a loop, whose body counts as often as it runs.
      program: its program.
      results: result types of its computation by name.
    """
    if instruction.opcode == "dot":
        return _dot(instruction, results)
    if instruction.opcode == "convolution":
        return _convolution(instruction, results)
    total = 0.0
    for name in instruction.called:
        body = program.computations.get(name, [])
        inner = {one.name: one.result for one in body}
        total += sum(flops(one, program, inner) for one in body)
    return total


def _dot(instruction: Instruction, results: Mapping[str, str]) -> float:
    (out,), lhs = shapes(instruction.result), shapes(results[instruction.operands[0]])[0]
    dims = _CONTRACTED.search(instruction.line)
    contracted = [int(d) for d in dims[1].split(",") if d] if dims else []
    return 2.0 * math.prod(out) * math.prod(lhs[d] for d in contracted)


def _convolution(instruction: Instruction, results: Mapping[str, str]) -> float:
    """FLOPs; products with padding or with the zeros of dilation do not count."""
    labels, window = _LABELS.search(instruction.line), _WINDOW.search(instruction.line)
    if not labels:
        return 0.0
    of_lhs, of_rhs, of_out = labels.groups()
    out = shapes(instruction.result)[0]
    lhs, rhs = (shapes(results[name])[0] for name in instruction.operands[:2])
    products = float(out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")])
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    count = len(of_out) - 2
    strides, into, apart = (
        [int(n) for n in fields[field].split("x")] if field in fields else [1] * count
        for field in ("stride", "lhs_dilate", "rhs_dilate")
    )
    pads = [p.split("_") for p in fields["pad"].split("x")] if "pad" in fields else [["0"]] * count
    for axis in range(count):
        size, taps = lhs[of_lhs.index(str(axis))], rhs[of_rhs.index(str(axis))]
        at = np.arange(out[of_out.index(str(axis))]) * strides[axis] - int(pads[axis][0])
        positions = at[:, None] + np.arange(taps)[None] * apart[axis]
        inside = (positions >= 0) & (positions <= (size - 1) * into[axis])
        products *= float(np.sum(inside & (positions % into[axis] == 0)))
    return 2.0 * products


def windows(instruction: Instruction, program: Program, results: Mapping[str, str]) -> Windows:
    """Windows of the convolutions, in called computations too; arguments as those of `flops`."""
    if instruction.opcode == "convolution":
        labels = _LABELS.search(instruction.line)
        if not labels:
            return Windows(0.0, 0.0)
        _, of_rhs, of_out = labels.groups()
        out, rhs = shapes(instruction.result)[0], shapes(results[instruction.operands[1]])[0]
        features = out[of_out.index("f")]
        elements = math.prod(out) / features * math.prod(rhs) / rhs[of_rhs.index("o")]
        return Windows(elements, 2.0 * elements * features)
    found = [Windows(0.0, 0.0)]
    for name in instruction.called:
        body = program.computations.get(name, [])
        inner = {one.name: one.result for one in body}
        found += [windows(one, program, inner) for one in body]
    return Windows(*map(sum, zip(*found, strict=True)))


def elementwise(
    instruction: Instruction, program: Program, results: Mapping[str, str]
) -> tuple[float, float]:
    """Elements of plain arithmetic, and of functions such as exp, in called computations too.

    Args:
      instruction: not a loop.
      program: its program.
      results: result types of its computation by name.
    """
    opcode = instruction.opcode
    if opcode in _PLAIN or opcode in _FUNCTIONS:
        size = float(sum(map(math.prod, shapes(instruction.result))))
        return (size, 0.0) if opcode in _PLAIN else (0.0, size)
    if opcode in ("reduce", "reduce-window"):
        return float(sum(map(math.prod, shapes(results.get(instruction.operands[0], ""))))), 0.0
    plain = functions = 0.0
    for name in instruction.called:
        body = program.computations.get(name, [])
        inner = {one.name: one.result for one in body}
        for one in body:
            counts = elementwise(one, program, inner)
            plain, functions = plain + counts[0], functions + counts[1]
    return plain, functions


def traffic(instruction: Instruction, program: Program, results: Mapping[str, str]) -> float:
    """Bytes that an instruction reads from HBM and writes to it.

    An array of which a fusion reads or overwrites a part counts as that part.

    Args:
      instruction: not a loop.
      program: its program.
      results: result types of its computation by name.
    """
    if instruction.opcode in FREE:
        return 0.0
    read = [hbm_bytes(results.get(name, "")) for name in instruction.operands]
    written = hbm_bytes(instruction.result)
    if instruction.opcode in _READS_A_PART:
        return 2.0 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * read[1]
    if instruction.opcode == "fusion" and instruction.called:
        body = program.computations.get(instruction.called[0], [])
        parts = _parts(body)
        read = [min(size, parts.get(index, size)) for index, size in enumerate(read)]
        root = body[-1] if body else None
        if root is not None and root.opcode == "dynamic-update-slice":
            inner = {one.name: one.result for one in body}
            written = min(written, hbm_bytes(inner.get(root.operands[1], "")))
    return float(sum(read) + written)


def _parts(body: Sequence[Instruction]) -> dict[int, int]:
    """Bytes of a fusion's parameters by number, where only a part of them is used."""
    inner = {one.name: one.result for one in body}
    parts = {}
    for one in body:
        number = _PARAMETER.search(one.line)
        users = [other for other in body if one.name in other.operands] if number else []
        sizes = []
        for user in users:
            if user.opcode in _READS_A_PART and user.operands[0] == one.name:
                sizes.append(hbm_bytes(user.result))
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == one.name:
                sizes.append(hbm_bytes(inner.get(user.operands[1], "")))
        if number and users and len(sizes) == len(users):
            parts[int(number[1])] = sum(sizes)
    return parts
