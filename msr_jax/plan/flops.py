"""Floating-point operations of a traced program: those of its matrix products and convolutions, loops with every turn.

A compiler's own count (`cost_analysis`) has the body of a loop once, however often it runs, and a network whose layers are
a scan comes out many times too cheap.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend import core


def count_flops(jaxpr: Any) -> float:
    """Operations on all devices together, two for a product and a sum.

    What is computed again for the gradient counts again; of a branch the costlier side counts, and of a choice by platform
    the default. FFTs and elementwise operations are left out.

    Args:
      jaxpr: of `jax.make_jaxpr(f)(…)` or `jax.jit(f).trace(…).jaxpr`.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        per_output = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # Of a dilated input, all but one in so many samples are zeros.
        return 2.0 * eqn.outvars[0].aval.size * per_output / np.prod(params["lhs_dilation"])
    if name == "cond":
        counts = [count_flops(branch) for branch in params["branches"]]
        return counts[-1] if params.get("branches_platforms") else max(counts)
    turns = params["length"] if name == "scan" else 1
    return turns * sum(count_flops(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one
