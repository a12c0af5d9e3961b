"""Seconds of a compiled program by operation, from a trace of JAX's profiler.

Used by the other benchmarks. On CPUs the events are HLO operations on all threads; on GPUs they are
kernels, each with its HLO operation.
"""

from __future__ import annotations

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax

# The kind of an operation: its opcode, or for a fusion its name.
_OPCODE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_NUMBER = re.compile(r"[.\d]+$")


def seconds_by_operation(call: Callable[[], Any], times: int) -> dict[str, float]:
    """Seconds of each HLO operation per call, summed over threads and devices.

    Args:
      call: runs the compiled program once and waits for its end.
      times: calls to average over.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(times):
                call()
        file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
        found: dict[str, float] = collections.Counter()
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    named = dict(event.stats).get("hlo_op")
                    if named is not None:
                        found[str(named)] += event.duration_ns * 1e-9 / times
    return dict(found)


def kinds(text: str) -> dict[str, str]:
    """Operation -> kind: the opcode; for a library call the target; for a fusion its name.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    """
    found = {}
    for line in text.splitlines():
        match = _OPCODE.match(line)
        if match:
            name, opcode = match.groups()
            target = _TARGET.search(line)
            kind = target[1] if target else _NUMBER.sub("", name)
            found[name] = kind if opcode in ("fusion", "custom-call", "call") else opcode
    return found


def seconds_by_kind(found: Mapping[str, float], text: str) -> dict[str, float]:
    """Seconds by kind of operation, the most expensive first."""
    of, total = kinds(text), collections.Counter()
    for name, seconds in found.items():
        total[of.get(name, _NUMBER.sub("", name))] += seconds
    return dict(total.most_common())
