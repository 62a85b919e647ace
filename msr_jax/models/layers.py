"""Layers of the one-dimensional U-Net, channels-last, with float32 parameters and a chosen compute precision.

Parameter names (`weight`, `bias`, `g`) are those of the published PyTorch program; layouts are channels-last.
`dtype` is the precision of matrix products and activations; statistics of norms, softmax and parameters stay float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from msr_jax.models.initial import uniform_fan
from msr_jax.models.platform import platform

Array = jax.Array
EPSILON = 1e-5  # of every norm
KEPT = "convolution"  # what a residual block on an accelerator keeps for the gradient, beside its inputs


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
def _tied(*arrays: Array) -> tuple[Array, ...]:
    """The arrays; their gradients come together, see `_together`."""
    return arrays


_tied.defvjp(lambda *arrays: (arrays, None), lambda _, cotangents: _together(*cotangents))


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
        narrow = _again(weight, dtype, cotangent)
        (x_bar,) = jax.linear_transpose(lambda x: convolution(x, narrow), x)(cotangent)
        (weight_bar,) = jax.linear_transpose(lambda weight: convolution(x, weight), narrow)(cotangent)
        x_bar, weight_bar = _together(x_bar, weight_bar)
        return x_bar, weight_bar.astype(weight.dtype)

    converted = jax.custom_vjp(lambda x, weight: convolution(x, weight.astype(dtype)))
    converted.defvjp(lambda x, weight: (convolution(x, weight.astype(dtype)), (x, weight)), backward)
    return converted


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


class Linear(nn.Module):
    """`y = x W + b` with W (in, out)."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = uniform_fan(x.shape[-1])
        y = product(x, self.param("weight", init, (x.shape[-1], self.features)), self.dtype)
        if self.use_bias:
            y, bias = _tied(y, self.param("bias", init, (self.features,)))
            y = y + bias
        return y.astype(self.dtype)


class Conv(nn.Module):
    """One-dimensional convolution with symmetric zero padding; weight (k, in, out). For `frame` see `convolve_frames`."""

    features: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = True
    zero_init: bool = False
    frame: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, x.shape[-1] // self.frame, self.features)
        init = nn.initializers.zeros if self.zero_init else uniform_fan(shape[0] * shape[1])
        weight = self.param("weight", init, shape)
        if self.frame == 1:
            y = convolve(x, weight, self.stride, self.padding, self.dtype)
        else:
            y = convolve_frames(x, weight, self.frame, self.dtype)
        if self.use_bias:
            y, bias = _tied(y, self.param("bias", init, (self.features,)))
            y = y + jnp.repeat(bias, self.frame)
        return checkpoint_name(y.astype(self.dtype), KEPT)


class Upsample(nn.Module):
    """Transposed convolution, kernel 2f, stride f, that maps length L to exactly fL; weight (2f, in, out).

    Every input gives two blocks of f outputs, one matrix product for all; the second block of an input falls on the
    first block of the next. An input-dilated convolution is the same function, but XLA's backward pass of it on a CPU
    is over ten times slower.
    """

    features: int
    factor: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, channels = x.shape
        f, out = self.factor, self.features
        init = uniform_fan(out * 2 * f)
        weight = self.param("weight", init, (2 * f, channels, out))
        bias = self.param("bias", init, (out,))
        matrix = lambda weight: jnp.moveaxis(weight, 0, 1).reshape(channels, 2 * f * out)
        blocks = product(x, weight, self.dtype, matrix)
        first, second = jnp.split(blocks, 2, axis=-1)  # each (batch, L, f·out)
        summed = jnp.pad(first, ((0, 0), (0, 1), (0, 0))) + jnp.pad(second, ((0, 0), (1, 0), (0, 0)))
        padding = f // 2 + f % 2
        y = summed.reshape(batch, (length + 1) * f, out)[:, padding : padding + f * length]
        return (y + bias).astype(self.dtype)


class GroupNorm(nn.Module):
    """Normalises over time and the channels of each of `groups` consecutive groups; float32 result.

    `scale_shift`, two arrays (batch, 1, channels), is applied after the norm's own gain and bias, as x·(scale + 1) + shift.
    With `frame` above 1 every channel stands there as `frame` samples, see `convolve_frames`.
    """

    groups: int
    frame: int = 1

    @nn.compact
    def __call__(self, x: Array, scale_shift: tuple[Array, Array] | None = None) -> Array:
        channels = x.shape[-1] // self.frame
        gain = self.param("weight", nn.initializers.ones, (channels,))
        offset = self.param("bias", nn.initializers.zeros, (channels,))
        if scale_shift is not None:
            scale, shift = scale_shift
            gain, offset = gain * (scale + 1), offset * (scale + 1) + shift
        x, gain, offset = _tied(x, gain, offset)
        gain, offset = (jnp.repeat(a, self.frame, axis=-1) for a in (gain, offset))
        x = x.astype(jnp.float32)
        # Over time first, then over groups: sums over both at once leave a CPU's vectors mostly empty. And in two passes:
        # E[x²]-E[x]² loses quiet signals in float32.
        means = x.mean(1, keepdims=True)  # (batch, 1, channels)
        variances = jnp.square(x - means).mean(1, keepdims=True)
        mean = self._over_groups(means)
        deviation = jnp.sqrt(self._over_groups(variances + jnp.square(means - mean)) + EPSILON)
        # Division comes last because XLA then stores these small arrays; others it works out again at every sample.
        return x * (gain / deviation) + (offset * deviation - mean * gain) / deviation

    def _over_groups(self, x: Array) -> Array:
        """Every channel of x (batch, 1, channels) replaced by the mean of its group."""
        grouped = x.reshape(x.shape[0], 1, self.groups, -1)
        return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(x.shape)


class LayerNorm(nn.Module):
    """Normalises over channels, gain only; float32 result."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, gain = _tied(x, self.param("g", nn.initializers.ones, (x.shape[-1],)))
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON) * gain


class Under(nn.Module):
    """Makes and runs a module one level deeper in the parameter tree, where the published names have such a level."""

    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, *args) -> Array:
        return self.make()(*args)


class ConvBlock(nn.Module):
    """GroupNorm, optional scale and shift, SiLU, convolution of three taps."""

    features: int
    groups: int
    zero_init: bool = False
    dtype: jnp.dtype = jnp.float32
    frame: int = 1

    @nn.compact
    def __call__(self, x: Array, scale_shift: tuple[Array, Array] | None = None) -> Array:
        h = GroupNorm(self.groups, self.frame, name="groupnorm")(x, scale_shift)
        conv: dict[str, Any] = {"padding": 1, "zero_init": self.zero_init, "dtype": self.dtype, "frame": self.frame}
        return Conv(self.features, 3, name="project", **conv)(nn.silu(h))


class ResidualBlock(nn.Module):
    """Two convolution blocks, the second scaled and shifted by the conditioning vector z (batch, 4·base channels).

    A `skip` is scaled by √½ and put beside x. With `frame` above 1 it runs at full rate on frames of so many samples; layout as in `convolve_frames`.
    """

    features: int
    groups: int
    zero_init: bool = False
    dtype: jnp.dtype = jnp.float32
    frame: int = 1

    @nn.compact
    def __call__(self, x: Array, z: Array, skip: Array | None = None) -> Array:
        if skip is not None:
            x = jnp.concatenate([x, skip * 2**-0.5], axis=-1)
        h = ConvBlock(self.features, self.groups, dtype=self.dtype, frame=self.frame, name="block1")(x)
        linear = partial(Linear, 2 * self.features, dtype=self.dtype, name="to_scale_shift_1")
        film = Under(linear, name="to_scale_shift")(nn.silu(z)).astype(jnp.float32)
        scale, shift = jnp.split(film[:, None], 2, axis=-1)
        last: dict[str, Any] = {"zero_init": self.zero_init, "dtype": self.dtype, "frame": self.frame}
        h = ConvBlock(self.features, self.groups, name="block2", **last)(h, (scale, shift))
        if x.shape[-1] != self.features * self.frame:
            x = Conv(self.features, 1, name="to_out", **last)(x)
        return h + x


def residual_block(*args: Any, **kwargs: Any) -> nn.Module:
    """A `ResidualBlock`. On accelerators its norms and activations are computed again for the gradient, its products not.

    (A CPU has the memory, and would take longer.)
    """
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    return (ResidualBlock if platform() == "cpu" else nn.remat(ResidualBlock, policy=policy))(*args, **kwargs)


class _AttentionOutput(nn.Module):
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Linear(self.features, use_bias=False, dtype=self.dtype, name="to_out_0")(x)
        return LayerNorm(name="to_out_1")(x)


class AttentionInner(nn.Module):
    heads: int
    head_features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, length, channels = x.shape
        width = self.heads * self.head_features
        u = LayerNorm(name="norm")(x)
        q = Linear(width, use_bias=False, dtype=self.dtype, name="to_q")(u)
        k, v = jnp.split(Linear(2 * width, use_bias=False, dtype=self.dtype, name="to_kv")(u), 2, axis=-1)
        q, k, v = (a.reshape(batch, length, self.heads, self.head_features) for a in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v)  # scale 1/√features, softmax in float32
        return _AttentionOutput(channels, self.dtype, name="attention")(mixed.reshape(batch, length, width))


class Attention(nn.Module):
    """Full self-attention over time without positions; a norm before, a norm after the output projection, no residual."""

    heads: int
    head_features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return AttentionInner(self.heads, self.head_features, self.dtype, name="fn")(x).astype(self.dtype)


class FeedForward(nn.Module):
    """Two 1×1 convolutions with exact GELU; the second norm stands between GELU and the second convolution."""

    multiplier: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        conv: dict[str, Any] = {"kernel_size": 1, "use_bias": False, "dtype": self.dtype}
        h = LayerNorm(name="feed_forward_0")(x)
        h = Conv(self.multiplier * channels, name="feed_forward_1", **conv)(h)
        h = LayerNorm(name="feed_forward_3")(nn.gelu(h.astype(jnp.float32), approximate=False))
        return Conv(channels, name="feed_forward_4", **conv)(h)


class Transformer(nn.Module):
    """Attention and feed-forward, each with a residual."""

    heads: int
    head_features: int
    multiplier: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Attention(self.heads, self.head_features, self.dtype, name="attention")(x) + x
        feed_forward = FeedForward(self.multiplier, self.dtype)
        nn.share_scope(self, feed_forward)  # the published names have no level of its own for it
        return feed_forward(x) + x
