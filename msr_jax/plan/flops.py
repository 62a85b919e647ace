"""Floating-point operations of a traced program: those of its matrix products and convolutions, loops with every turn.

A compiler's own count (`cost_analysis`) has the body of a loop once, however often it runs, and a network whose layers are
a scan comes out many times too cheap.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend import core

# (operations per query, key and feature) of cuDNN's fused attention: two products, and with its gradient five more.
FUSED_ATTENTION = {"dot_product_attention_fwd_wrapper": 4, "dot_product_attention_bwd_wrapper": 10}
NAMES = {"gpu": "cuda"}  # platforms by the name that a branch has


def count_flops(jaxpr: Any, platform: str = "") -> float:
    """Operations on all devices together, two for a product and a sum.

    What is computed again for the gradient counts again; of a branch the costlier side counts, and of a choice by platform
    that of `platform` ("tpu", "gpu", "cpu"), or the default. FFTs and elementwise operations are left out.

    Args:
      jaxpr: of `jax.make_jaxpr(f)(…)` or `jax.jit(f).trace(…).jaxpr`.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_of_equation(eqn, platform) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any, platform: str) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        per_output = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        # Of a dilated input, all but one in so many samples are zeros.
        return 2.0 * eqn.outvars[0].aval.size * per_output / np.prod(params["lhs_dilation"])
    if name in FUSED_ATTENTION:
        query, key = eqn.invars[0].aval, eqn.invars[1].aval  # (batch, length, heads, features)
        return float(FUSED_ATTENTION[name]) * query.size * key.shape[1]
    if name == "cond":
        of_platform = params.get("branches_platforms")
        if of_platform:
            wanted = NAMES.get(platform, platform)
            default = len(of_platform) - 1
            chosen = next((k for k, names in enumerate(of_platform) if names and wanted in names), default)
            return count_flops(params["branches"][chosen], platform)
        return max(count_flops(branch, platform) for branch in params["branches"])
    turns = params["length"] if name == "scan" else 1
    if name == "pallas_call":  # its body is one block's
        turns = int(np.prod(params["grid_mapping"].grid))
    if name == "shard_map":  # its body is one device's
        turns = params["mesh"].size
    return turns * sum(count_flops(inner, platform) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one
