"""Memory that a traced program needs at once, before it is compiled.

The operations run in the order of the trace, and a value is freed after its last use. A compiler
fuses operations, so a compiled program usually needs less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """Bytes of all values that are live at once, without the program's arguments and constants.

    Args:
      jaxpr: of a traced program, `Traced.jaxpr.jaxpr`; a loop counts as one iteration.
    """
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last |= dict.fromkeys((v for v in eqn.invars if isinstance(v, core.Var)), index)
    last |= dict.fromkeys((v for v in jaxpr.outvars if isinstance(v, core.Var)), len(jaxpr.eqns))
    live, peak = 0, 0
    held: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        inside = max((peak_bytes(inner) for inner in _inner(eqn)), default=0)
        outputs = {var: _bytes(var.aval) for var in eqn.outvars}
        peak = max(peak, live + max(sum(outputs.values()), inside))
        held |= outputs
        live += sum(outputs.values())
        for var in {*eqn.outvars, *(v for v in eqn.invars if isinstance(v, core.Var))}:
            if last.get(var, -1) <= index:
                live -= held.pop(var, 0)
    return peak


def _inner(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Jaxprs among an operation's parameters: of loops, branches and calls."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _bytes(aval: Any) -> int:
    dtype = aval.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8 * math.prod(aval.shape)
    return dtype.itemsize * math.prod(aval.shape)
