"""The waveform U-Net: deterministic, diffusion and consistency networks from one definition.

The three differ only in the noise-level input `tau` (the last two have it) and in the list of features that is added to
the running activation (paper, section on feature injection).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from msr_jax.errors import UserError
from msr_jax.models.initial import draw_marked, normal
from msr_jax.models.interface import Backbone, read_fields
from msr_jax.models.layers import Attention, Conv, Linear, Transformer, Under, Upsample, residual_block

Array = jax.Array


def patch(x: Array, size: int) -> Array:
    """(batch, length, q) -> (batch, length/size, q·size); channel q·size + r holds sample r of the patch."""
    batch, length, q = x.shape
    return x.reshape(batch, length // size, size, q).swapaxes(2, 3).reshape(batch, length // size, q * size)


def unpatch(x: Array, size: int) -> Array:
    """The inverse of `patch`: (batch, length, q·size) -> (batch, length·size, q)."""
    batch, length, channels = x.shape
    q = channels // size
    return x.reshape(batch, length, q, size).swapaxes(2, 3).reshape(batch, length * size, q)


def _edge_block(name: str, features: int, groups: int, zero_init: bool, dtype: Any, patch_factor: int) -> Under:
    """A full-rate residual block that takes and gives patches."""
    block = partial(residual_block, features, groups, zero_init, dtype, patch_factor, name="block")
    return Under(partial(Under, block, name="module_list_0"), name=name)


class TimeEmbedding(nn.Module):
    """Learned Fourier features of tau (batch,): (batch, 2·half + 1) in the order tau, sines, cosines."""

    half: int

    @nn.compact
    def __call__(self, tau: Array) -> Array:
        frequencies: Any = self.param("weights", normal, (self.half,))
        tau = tau[:, None]
        angles = 2 * np.pi * tau * frequencies
        return jnp.concatenate([tau, jnp.sin(angles), jnp.cos(angles)], axis=-1)


class EncoderLevel(nn.Module):
    """Down-sampling, residual blocks, optional transformer; returns the output and the level's skips in order."""

    features: int
    factor: int
    kernel_multiplier: int
    num_blocks: int
    groups: int
    transformer: Transformer | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, z: Array) -> tuple[Array, list[Array]]:
        f, skips = self.factor, []
        kernel = self.kernel_multiplier * f + 1
        x = Conv(self.features, kernel, f, (kernel - 1) // 2, dtype=self.dtype, name="downsample")(x)
        for b in range(self.num_blocks):
            x = residual_block(self.features, self.groups, dtype=self.dtype, name=f"blocks_{b}")(x, z)
            skips.append(x)
        if self.transformer is not None:
            x = self.transformer(x)
            skips.append(x)
        return x, skips


class Bottleneck(nn.Module):
    """Residual block, attention without a residual, residual block."""

    features: int
    groups: int
    heads: int
    head_features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, z: Array) -> Array:
        x = residual_block(self.features, self.groups, dtype=self.dtype, name="pre_block")(x, z)
        x = Attention(self.heads, self.head_features, self.dtype, name="attention")(x)
        return residual_block(self.features, self.groups, dtype=self.dtype, name="post_block")(x, z)


class DecoderLevel(nn.Module):
    """One residual block per skip (the last first, scaled by √½), optional transformer, up-sampling."""

    inner_features: int
    features: int
    factor: int
    groups: int
    transformer: Transformer | None
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, skips: Sequence[Array], z: Array) -> Array:
        for b, skip in enumerate(reversed(skips)):
            x = residual_block(self.inner_features, self.groups, dtype=self.dtype, name=f"blocks_{b}")(x, z, skip)
        if self.transformer is not None:
            x = self.transformer(x)
        return Upsample(self.features, self.factor, self.dtype, name="upsample")(x)


class UNet1d(nn.Module):
    """Fields are those of the published config; official values as defaults.

    `zero_init_output` starts the last residual block at zero (for small models trained from scratch; off as published).
    `remat` lists the levels (0 is the shallowest) whose activations are computed again in the backward pass.
    """

    in_channels: int = 1
    channels: int = 256
    patch_factor: int = 16
    multipliers: Sequence[int] = (1, 2, 4, 4, 4, 4, 4)
    factors: Sequence[int] = (4, 4, 4, 2, 2, 2)
    num_blocks: Sequence[int] = (2, 2, 2, 2, 2, 2)
    attentions: Sequence[bool] = (False, False, False, True, True, True)
    attention_heads: int = 8
    attention_features: int = 128
    attention_multiplier: int = 2
    resnet_groups: int = 8
    kernel_multiplier_downsample: int = 2
    context_features: int = 4
    zero_init_output: bool = False
    remat: Sequence[int] = ()
    dtype: Any = jnp.float32

    def _transformer(self, level: int) -> Transformer | None:
        if not self.attentions[level]:
            return None
        sizes = (self.attention_heads, self.attention_features, self.attention_multiplier)
        return Transformer(*sizes, self.dtype, name="transformer", parent=None)

    def _conditioning(self, label: Array, tau: Array | None) -> Array:
        """The vector z (batch, 4·channels) that every residual block takes, from the label and the noise level."""
        width = 4 * self.channels
        gelu = lambda x: nn.gelu(x.astype(jnp.float32), approximate=False)
        # Float32 whatever the compute precision: it costs nothing and tau spans fine steps.
        z = gelu(Linear(width, name="to_features_0")(label))
        self.sow("intermediates", "to_features", z)
        if tau is not None:
            embedded = gelu(
                Linear(width, name="to_time_0_1")(TimeEmbedding(self.channels // 2, name="to_time_0_0")(tau))
            )
            self.sow("intermediates", "to_time", embedded)
            z = z + embedded
        z = gelu(Linear(width, name="to_mapping_2")(gelu(Linear(width, name="to_mapping_0")(z))))
        self.sow("intermediates", "to_mapping", z)
        return z

    @nn.compact
    def __call__(
        self, x: Array, label: Array, tau: Array | None = None, injected: Sequence[Array] | None = None
    ) -> tuple[Array, list[Array]]:
        """One evaluation of the network.

        Args:
          x: (batch, time, channels) waveform; time a multiple of `length_multiple`.
          label: (batch, labels) one-hot.
          tau: (batch,) noise-level input ln(σ)/4; None for the deterministic network, which has no such parameters.
          injected: the 2n+3 arrays of a deterministic network's feature list, added to the running activation.

        Returns:
          The output (batch, time, channels) in float32 and this network's own feature list: x, the output of every stage,
          the last of them with the long skip added, i.e. what enters each stage.
        """
        n, width = len(self.factors), [self.channels * m for m in self.multipliers]
        add = lambda x, k: x if injected is None else x + injected[k].astype(x.dtype)
        remat = lambda module, level: nn.remat(module) if level in self.remat else module
        groups = min(self.patch_factor, self.in_channels)
        z = self._conditioning(label, tau)
        features = [x]
        h = add(x, 0)
        to_in = _edge_block("to_in", self.channels // self.patch_factor, groups, False, self.dtype, self.patch_factor)
        h = to_in(patch(h, self.patch_factor), z)
        features.append(h)
        long_skip, skips = h, []
        for i in range(n):
            level = remat(EncoderLevel, i)(
                width[i + 1], self.factors[i], self.kernel_multiplier_downsample, self.num_blocks[i], self.resnet_groups,
                self._transformer(i), self.dtype, name=f"downsamples_{i}",
            )  # fmt: skip
            h, level_skips = level(add(h, 1 + i), z)
            skips.append(level_skips)
            features.append(h)
        sizes = (self.attention_heads, self.attention_features)
        h = Bottleneck(width[n], self.resnet_groups, *sizes, self.dtype, name="bottleneck")(add(h, n + 1), z)
        features.append(h)
        for j in range(n):
            i = n - 1 - j
            level = remat(DecoderLevel, i)(
                width[i + 1], width[i], self.factors[i], self.resnet_groups, self._transformer(i), self.dtype,
                name=f"upsamples_{j}",
            )  # fmt: skip
            h = level(add(h, n + 2 + j), skips.pop(), z)
            features.append(h)
        self.sow("intermediates", "last_level", h)
        h = h + long_skip
        features[-1] = h
        to_out = _edge_block("to_out", self.in_channels, groups, self.zero_init_output, self.dtype, self.patch_factor)
        y = to_out(add(h, 2 * n + 2), z)
        return unpatch(y, self.patch_factor).astype(jnp.float32), features

    @property
    def length_multiple(self) -> int:
        """Samples that the input length must be a multiple of."""
        return self.patch_factor * int(np.prod(self.factors))


def make_unet1d(sizes: Mapping[str, Any], dtype: jnp.dtype) -> Backbone:
    """The U-Net as a backbone; UserError for sizes that are unknown or contradict each other."""
    fields = read_fields(sizes, UNet1d.__dataclass_fields__)
    levels: dict[str, int] = {n: len(fields[n]) for n in ("factors", "num_blocks", "attentions") if n in fields}
    if "multipliers" in fields:
        levels["multipliers (less one)"] = len(fields["multipliers"]) - 1
    if len(set(levels.values())) > 1:
        raise UserError(f"the model config names different numbers of levels: {levels}")
    net = UNet1d(**fields, dtype=dtype)
    if net.channels % net.patch_factor:
        raise UserError(f"model.channels ({net.channels}) must be a multiple of patch_factor ({net.patch_factor})")
    if net.multipliers[0] != 1:
        raise UserError(f"model.multipliers must begin with 1, the channels of the patches, not {net.multipliers[0]}")
    if any(net.kernel_multiplier_downsample * factor % 2 for factor in net.factors):
        raise UserError(
            f"model.kernel_multiplier_downsample ({net.kernel_multiplier_downsample}) times each of model.factors must be even"
        )
    if beyond := [level for level in net.remat if not 0 <= level < len(net.factors)]:
        raise UserError(f"model.remat names level {beyond[0]}; there are 0 to {len(net.factors) - 1}")
    # The patches, at multipliers[0], have groups of their own.
    odd = [c for c in net.multipliers[1:] if net.channels * c % net.resnet_groups]
    if odd:
        raise UserError(
            f"model.resnet_groups ({net.resnet_groups}) must divide the channels of every level, such as {net.channels * odd[0]}"
        )

    def init(key: Array, timed: bool, conditioned: bool | None = None) -> Any:
        x = jnp.zeros((1, net.length_multiple, net.in_channels))
        label = jnp.zeros((1, net.context_features))
        return draw_marked(key, net.init(key, x, label, jnp.zeros((1,)) if timed else None)["params"])

    def separate(params: Any, mixture: Array, label: Array, key: Array | None = None) -> tuple[Array, Any]:
        return net.apply({"params": params}, mixture, label)

    def refine(
        params: Any,
        x: Array,
        label: Array,
        tau: Array | None,
        injected: Sequence[Array] | None,
        key: Array | None = None,
    ) -> Array:
        return net.apply({"params": params}, x, jnp.tile(label, (len(x) // len(label), 1)), tau, injected)[0]

    exact = ("to_features_0", "to_time_0_0", "to_time_0_1", "to_mapping_0", "to_mapping_2")
    return Backbone(init, separate, lambda params, features: features, refine, net.length_multiple, exact=exact)
