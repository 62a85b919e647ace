"""Loops over slices of arrays that may be bfloat16.

A CPU's compiler has no slices of bfloat16: it converts the whole array to float32 before the loop and each slice back within,
and of what a loop gathers it converts all that is there in every turn. As 16-bit integers they stay as they are. Where
they come so already (`Backbone.looped`), there is no second copy of them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from msr_jax.devices import platform

Array = jax.Array
BITS = jnp.dtype(jnp.uint16)


def scan_slices(body: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any, is_fixed: bool) -> tuple[Any, Any]:
    """`lax.scan(body, init, xs)`.

    Args:
      is_fixed: no gradient is wanted of xs or of what the loop gathers; there is none through integers, and a TypeError says so.
    """
    if platform() != "cpu" or not is_fixed:
        return lax.scan(body, init, xs)

    def packed(carry: Any, x: Any) -> tuple[Any, Any]:
        carry, y = body(carry, unpack(x))
        return carry, pack(y)

    carry, ys = lax.scan(packed, init, pack(xs))
    return carry, unpack(ys)


def map_slices(function: Callable[[Any], Any], xs: Any, is_fixed: bool) -> Any:
    """`lax.map(function, xs)`; for `is_fixed` see `scan_slices`."""
    return scan_slices(lambda _, x: ((), function(x)), (), xs, is_fixed)[1]


@jax.custom_jvp
def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, BITS)


@_bits.defjvp
def _no_gradient(primals: Any, tangents: Any) -> Any:  # JAX's own would be zero, without a word
    raise TypeError("a network whose parameters are stored in bfloat16 has no gradient on a CPU; give it float32 ones")


def pack(tree: Any) -> Any:
    """The tree, arrays of bfloat16 as their bits."""
    return jax.tree.map(lambda a: _bits(a) if a.dtype == jnp.bfloat16 else a, tree)


def unpack(tree: Any) -> Any:
    """The tree that `pack` had."""
    return jax.tree.map(lambda a: lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == BITS else a, tree)


def is_narrow(x: Array) -> bool:
    """Whether x is bfloat16, as such or as its bits."""
    return x.dtype in (jnp.bfloat16, BITS)
