"""Products and convolutions in a chosen precision, accumulated in float32, and what their gradients keep and wait for.

`dtype` is the precision of the factors, forward and back; parameters and their gradients stay float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from msr_jax.devices import has_whole_parameters, platform

Array = jax.Array


def _accumulate(x: Array, y: Array, contract: tuple) -> Array:
    return lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.float32)


def _again(weight: Array, dtype: jnp.dtype, cotangent: Array) -> Array:
    """The weight in `dtype` for the gradient: converted anew, so that no second copy of a network is kept until then.

    The barrier keeps the compiler from converting once for both, and from converting before it is time.
    """
    if weight.dtype == dtype:
        return weight
    return lax.optimization_barrier((weight, cotangent))[0].astype(dtype)


def _together(*cotangents: Array) -> tuple[Array, ...]:
    """Gradients of one operation, none of which goes on before all are there, on accelerators.

    A compiler would put off the sums that make the gradients of parameters, which nothing waits for, and hold what they are
    summed from until then.
    """
    return cotangents if platform() == "cpu" else lax.optimization_barrier(cotangents)


@jax.custom_vjp
def tied(*arrays: Array) -> tuple[Array, ...]:
    """The arrays; their gradients come together, see `_together`."""
    return arrays


tied.defvjp(lambda *arrays: (arrays, None), lambda _, cotangents: _together(*cotangents))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, weight: Array, dtype: jnp.dtype, as_matrix: Callable[[Array], Array]) -> Array:
    return _accumulate(x, as_matrix(weight.astype(dtype)), ((x.ndim - 1,), (0,)))


def _product_backward(
    dtype: jnp.dtype, as_matrix: Callable[[Array], Array], saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    # The cotangent comes in float32. Left so, both products would fall back to float32 and off the matrix units.
    x, weight = saved
    cotangent = cotangent.astype(dtype)
    leading = tuple(range(x.ndim - 1))
    x_bar = _accumulate(cotangent, as_matrix(_again(weight, dtype, cotangent)), ((x.ndim - 1,), (1,)))
    matrix_bar = _accumulate(x, cotangent, (leading, leading)).astype(dtype)
    x_bar, matrix_bar = _together(x_bar.astype(x.dtype), matrix_bar)
    (weight_bar,) = jax.linear_transpose(as_matrix, jax.ShapeDtypeStruct(weight.shape, dtype))(matrix_bar)
    return x_bar, weight_bar.astype(weight.dtype)


_product.defvjp(lambda x, weight, *rest: (_product(x, weight, *rest), (x, weight)), _product_backward)


def product(x: Array, weight: Array, dtype, as_matrix: Callable[[Array], Array] = lambda weight: weight) -> Array:
    """`(…, in) @ (in, out)` in `dtype`, accumulated in float32; gradients likewise.

    `as_matrix`, linear, makes the matrix of a weight of another shape: anew for the gradient, so that no second copy of a
    network is kept until then. On a CPU, bfloat16 reaches the matrix units in this form alone.
    """
    return _product(x.astype(dtype), weight, jnp.dtype(dtype), as_matrix)


def product_first(weight: Array, x: Array, dtype: jnp.dtype) -> Array:
    """`product(x, weight)` for a weight of few columns, with these as the first axis: (in, out), (…, in) -> (out, …).

    A GPU's compiler would merge it with another product of x, into one of a width that its tiles do not fit; and an array whose
    last axis is a few wide takes many times its size on a TPU. A CPU takes products of bfloat16 in the usual form alone.
    """
    if platform() == "cpu":
        return jnp.moveaxis(product(x, weight, dtype), -1, 0)
    return _product_first(weight, x, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_first(weight: Array, x: Array, dtype: jnp.dtype) -> Array:
    return _accumulate(weight.astype(dtype), x.astype(dtype), ((0,), (x.ndim - 1,)))


def _product_first_backward(dtype: jnp.dtype, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    weight, x = saved
    narrow, leading = cotangent.astype(dtype), tuple(range(x.ndim - 1))
    if platform() == "gpu":  # its compiler finds no tiles for the product, of few terms, for some numbers of tokens
        columns = weight.astype(dtype).astype(jnp.float32).T
        terms: Any = (one.astype(jnp.float32)[..., None] * column for one, column in zip(narrow, columns, strict=True))
        x_bar = sum(terms)
    else:
        x_bar = _accumulate(narrow, weight.astype(dtype), ((0,), (1,)))
    weight_bar = _accumulate(x.astype(dtype), narrow, (leading, tuple(axis + 1 for axis in leading)))
    return weight_bar.astype(dtype).astype(weight.dtype), x_bar.astype(dtype).astype(x.dtype)


_product_first.defvjp(lambda weight, x, dtype: (_product_first(weight, x, dtype), (weight, x)), _product_first_backward)


def convolve(x: Array, weight: Array, stride: int, padding: int, dtype) -> Array:
    """Cross-correlation of x (batch, time, in) with weight (k, in, out), zeros on both sides.

    The result is float32 or, on accelerators, `dtype`; sums are float32 everywhere.
    """
    x, taps = x.astype(dtype), weight.shape[0]
    if taps == 1 and stride == 1:
        return product(x, weight[0], dtype)
    direct = partial(_convolve_directly, stride=stride, padding=padding)
    if platform() != "cpu":
        return converting(direct, jnp.dtype(dtype))(x, weight)
    weight = weight.astype(dtype)
    products = partial(_convolve_by_products, stride=stride, padding=padding)
    return (products if dtype == jnp.bfloat16 else differentiated_as(direct, products))(x, weight)


def differentiated_as(direct: Callable[..., Array], products: Callable[..., Array]) -> Callable[..., Array]:
    """A convolution in its direct form for inference and, where gradients are wanted, as matrix products.

    Inside a loop such as the scan over training steps, XLA's direct form of the weights' gradient is 30 times slower on a
    CPU than outside of one.
    """
    convolution = jax.custom_vjp(direct)
    convolution.defvjp(lambda *args: jax.vjp(products, *args), lambda pull_back, cotangent: pull_back(cotangent))
    return convolution


def converting(convolution: Callable[[Array, Array], Array], dtype: jnp.dtype) -> Callable[[Array, Array], Array]:
    """A convolution of x in `dtype` with a weight that is converted to it, and once more for the gradient, see `_again`."""

    def backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        x, weight = saved
        narrow = _again(_as_it_lies(weight), dtype, cotangent)
        (x_bar,) = jax.linear_transpose(lambda x: convolution(x, narrow), x)(cotangent)
        (weight_bar,) = jax.linear_transpose(lambda weight: convolution(x, weight), narrow)(cotangent)
        x_bar, weight_bar = _together(x_bar, weight_bar)
        return x_bar, _as_it_lies(weight_bar).astype(weight.dtype)

    forward = lambda x, weight: convolution(x, _as_it_lies(weight).astype(dtype))
    converted = jax.custom_vjp(forward)
    converted.defvjp(lambda x, weight: (forward(x, weight), (x, weight)), backward)
    return converted


def _as_it_lies(weight: Array) -> Array:
    """A weight (k, in, out), or its gradient, in the order of the parameter's bytes, on a GPU.

    cuDNN wants another order. Left to itself the compiler has every kernel of every network in it before the loop over
    micro-batches, a second copy of all of them; so each is turned where it is used. (Not where parameters are gathered: the
    compiler would gather them in both orders.)
    """
    if platform() != "gpu" or not has_whole_parameters():
        return weight
    return with_layout_constraint(weight, Layout((0, 1, 2)))


def _convolve_directly(x: Array, weight: Array, stride: int, padding: int) -> Array:
    return lax.conv_general_dilated(x, weight, (stride,), [(padding, padding)], dimension_numbers=("NWC", "WIO", "NWC"))


def _convolve_by_products(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """`convolve` as matrix products, forward and backward: the form that a CPU's bfloat16 units take."""
    taps, channels, features = weight.shape
    batch, samples, _ = x.shape
    length = (samples + 2 * padding - taps) // stride + 1
    if stride == 1:  # one product to the contributions of all taps, added where they belong
        x = jnp.pad(x, ((0, 0), (padding, padding), (0, 0)))
        blocks: Any = product(x, jnp.moveaxis(weight, 0, 1).reshape(channels, taps * features), x.dtype)
        return sum(blocks[:, k : k + length, k * features : (k + 1) * features] for k in range(taps))
    steps = -(-taps // stride)  # `stride` samples side by side are one wide frame; `steps` frames make one output
    frames = length - 1 + steps
    x = jnp.pad(x, ((0, 0), (padding, frames * stride - samples - padding), (0, 0)))
    x = x.reshape(batch, frames, stride * channels)
    rows = np.minimum(stride, taps - stride * np.arange(steps)) * channels
    parts = jnp.split(weight.reshape(taps * channels, features), np.cumsum(rows)[:-1])
    terms: Any = (product(x[:, j : j + length, : rows[j]], parts[j], x.dtype) for j in range(steps))
    return sum(terms)


def convolve_frames(x: Array, weight: Array, frame: int, dtype) -> Array:
    """Convolution over samples, same length, of x (batch, frames, in·frame) with weight (k, in, out), k 1 or 3.

    Channel i of a frame's sample r is x[..., i·frame + r]. Matrix units and vectors do nothing well with the few channels
    of full-rate audio; with frames side by side it is one product with a banded matrix.
    """
    taps, channels, features = weight.shape
    reach = taps // 2
    position = np.arange(-reach, frame + reach)
    # A sample at `position` of a frame meets output r of the frame with this tap.
    meets = position[:, None] == np.arange(frame) + np.arange(-reach, reach + 1)[:, None, None]  # (tap, position, r)
    banded = jnp.einsum("kio,kpr->pior", weight, meets.astype(np.float32))
    inside = banded[reach : reach + frame].swapaxes(0, 1).reshape(channels * frame, features * frame)
    if not reach:
        return product(x, inside, dtype)
    outside = banded[:: frame + 1].reshape(2 * channels, features * frame)
    before = jnp.pad(x[:, :-1, frame - 1 :: frame], ((0, 0), (1, 0), (0, 0)))  # last samples of the frame before
    after = jnp.pad(x[:, 1:, ::frame], ((0, 0), (0, 1), (0, 0)))
    return product(jnp.concatenate([x, before, after], axis=-1), jnp.concatenate([inside, outside]), dtype)
