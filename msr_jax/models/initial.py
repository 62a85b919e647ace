"""Initial parameters, all of a network from one draw.

A draw of its own for each of a network's hundred parameters is a program of its own: compiling them took longer than
compiling the training step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

Array = jax.Array
Initialiser = Callable[[Any, tuple[int, ...]], Any]  # (key, which it ignores; shape) -> ToDraw


@struct.dataclass
class ToDraw(nn.meta.AxisMetadata[Array]):
    """Marks a parameter that `draw_marked` is to fill; inside the network it reads as its value, zeros.

    `bound` is b of U(-b, b); None stands for the standard normal distribution.
    """

    value: Array
    bound: float | None = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return ToDraw(val, self.bound)

    def add_axis(self, index: int, params: dict) -> "ToDraw":
        return self

    def remove_axis(self, index: int, params: dict) -> "ToDraw":
        return self


def uniform_fan(fan: int) -> Initialiser:
    """Initialiser U(-1/√fan, 1/√fan): the published programs' default for convolutions, linear layers and their biases."""
    bound = float(1.0 / np.sqrt(fan))
    return lambda key, shape: ToDraw(jnp.zeros(shape), bound)


def normal(key: Array, shape: tuple[int, ...]) -> ToDraw:
    """Initialiser N(0, 1)."""
    return ToDraw(jnp.zeros(shape), None)


def linear_params(
    name: str, leading: tuple[int, ...], inputs: int, outputs: int, is_zero: bool = False
) -> dict[str, Any]:
    """Weights `name` (*leading, in, out) and biases `name`_bias of linear layers, uniform by fan-in, as PyTorch has it."""
    return _weighted(name, (*leading, inputs, outputs), (*leading, outputs), inputs, is_zero)


def conv_params(name: str, taps: int, inputs: int, outputs: int, is_zero: bool = False) -> dict[str, Any]:
    """The same of a convolution over images of taps × taps: weights (taps, taps, in, out)."""
    return _weighted(name, (taps, taps, inputs, outputs), (outputs,), taps**2 * inputs, is_zero)


def _weighted(name: str, weight: tuple[int, ...], bias: tuple[int, ...], fan: int, is_zero: bool) -> dict[str, Any]:
    init: Initialiser = nn.initializers.zeros if is_zero else uniform_fan(fan)
    return {name: init(None, weight), f"{name}_bias": init(None, bias)}


def draw_marked(key: Array, params: Any) -> Any:
    """`params` with every `ToDraw` in it replaced by float32 values of its shape and distribution, from one long draw.

    The other leaves stay as they are. Another set of marked parameters gets other values from the same key.
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, ToDraw))
    marked = [leaf for leaf in leaves if isinstance(leaf, ToDraw)]
    ends = np.cumsum([leaf.value.size for leaf in marked])
    lowest = np.nextafter(np.float32(-1), np.float32(0))  # -1 itself would be an infinite normal value
    drawn = iter(jnp.split(jax.random.uniform(key, (int(ends[-1]),), minval=lowest), ends[:-1]) if marked else ())

    def fill(leaf: Any) -> Array:
        if not isinstance(leaf, ToDraw):
            return leaf
        values = next(drawn).reshape(leaf.value.shape)
        return np.sqrt(2) * jax.lax.erf_inv(values) if leaf.bound is None else leaf.bound * values

    return jax.tree.unflatten(tree, [fill(leaf) for leaf in leaves])
