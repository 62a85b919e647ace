"""Layers of the one-dimensional U-Net, channels-last, with float32 parameters and a chosen compute precision.

Parameter names (`weight`, `bias`, `g`) are those of the published PyTorch program; layouts are channels-last.
`dtype` is the precision of matrix products and activations; statistics of norms, softmax and parameters stay float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from msr_jax.devices import platform
from msr_jax.models.initial import uniform_fan
from msr_jax.models.products import convolve, convolve_frames, product, tied

Array = jax.Array
EPSILON = 1e-5  # of every norm
KEPT = "convolution"  # what a residual block on an accelerator keeps for the gradient, beside its inputs


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
            y, bias = tied(y, self.param("bias", init, (self.features,)))
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
            y, bias = tied(y, self.param("bias", init, (self.features,)))
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
        x, gain, offset = tied(x, gain, offset)
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
        x, gain = tied(x, self.param("g", nn.initializers.ones, (x.shape[-1],)))
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
    """Norm, self-attention over time, projection and norm: (batch, time, channels) -> the same."""

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
