"""FLOPs of a traced program: multiplications and additions of matrix products and convolutions.

Counted from the jaxpr, because the compiler's cost analysis counts the body of a loop once.
Elementwise operations, a few percent, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend import core


def count(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> float:
    """FLOPs of one run over all devices; a conditional counts as its most expensive branch."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "conv_general_dilated":
            total += convolution(eqn)
        elif name == "cond":
            total += max(count(branch) for branch in eqn.params["branches"])
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(count(inner) for inner in _inner(eqn.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr | core.ClosedJaxpr]:
    for value in params.values():
        if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
            yield value


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dot(eqn: core.JaxprEqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = _shape(eqn.invars[0])
    return 2.0 * np.prod(_shape(eqn.outvars[0])) * np.prod([lhs[axis] for axis in contracted])


def convolution(eqn: core.JaxprEqn) -> float:
    """FLOPs of a convolution; products with padding or with the zeros of dilation do not count."""
    params, dims = eqn.params, eqn.params["dimension_numbers"]
    lhs, rhs = map(_shape, eqn.invars)
    out = _shape(eqn.outvars[0])
    products = float(out[dims.out_spec[0]] * out[dims.out_spec[1]] * rhs[dims.rhs_spec[1]])
    for axis, (low, _) in enumerate(params["padding"]):
        size, taps = lhs[dims.lhs_spec[2 + axis]], rhs[dims.rhs_spec[2 + axis]]
        dilation = params["lhs_dilation"][axis]
        first = np.arange(out[dims.out_spec[2 + axis]]) * params["window_strides"][axis] - low
        position = first[:, None] + np.arange(taps) * params["rhs_dilation"][axis]
        inside = (position >= 0) & (position <= (size - 1) * dilation)
        inside &= position % dilation == 0
        products *= inside.sum()
    return 2.0 * products
