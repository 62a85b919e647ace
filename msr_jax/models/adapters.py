"""What a refining RoFormer has beyond a separator: the vector that FiLM is made of, and adapters on the separator's features.

Functions of a dict of parameters, as in `roformer`.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msr_jax.devices import platform
from msr_jax.models.initial import conv_params, linear_params, normal
from msr_jax.models.products import differentiated_as, product
from msr_jax.models.roformer import gelu
from msr_jax.models.slices import is_narrow, map_slices

Array = jax.Array
Params = Mapping[str, Any]
FRAMES = 128  # that the adapter of the spectrum runs over at a time


def init_embedding(key: Array, dim: int, stems: int) -> dict[str, Any]:
    """Parameters of `embed`."""
    wide = 4 * dim
    linears = linear_params("to_time", (), dim, wide)
    linears |= linear_params("to_mapping_0", (), wide, wide) | linear_params("to_mapping_2", (), wide, wide)
    return {**linears, "stem_embedding": normal(key, (stems, wide))}


def embed(p: Params, tau: Array, label: Array) -> tuple[Array, dict[str, Array]]:
    """The vector (batch, 4·dim) that FiLM is made of, from the noise level (batch,) and the stem (rows, stems).

    Returns:
      The vector, and what it is made from: "time_emb" and "mapping", of its shape.
    """
    half = p["to_time"].shape[0] // 2
    frequencies = 10000.0 ** (-np.arange(half, dtype=np.float32) / (half - 1))
    angles = tau[:, None] * frequencies
    linear = lambda x, name: product(x, p[name], jnp.float32) + p[f"{name}_bias"]
    time = gelu(linear(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1), "to_time"))
    stem = p["stem_embedding"][label.argmax(-1)]
    mapped = time + jnp.tile(stem, (len(tau) // len(stem), 1))
    mapped = gelu(linear(gelu(linear(mapped, "to_mapping_0")), "to_mapping_2"))
    return gelu(mapped), {"time_emb": time, "mapping": mapped}  # GELU once more, as published


def init_adapters(dim: int, depth: int, channels: int, hidden: int) -> dict[str, Any]:
    """Parameters of `adapt` for a network of `depth` layers; its last products are zero, so that it starts by adding nothing."""
    image = 2 * channels
    two = lambda leading: {
        **linear_params("linear_0", leading, dim, dim),
        **linear_params("linear_2", leading, dim, dim, is_zero=True),
    }
    return {
        "stft": {
            **conv_params("conv_1", 3, image, hidden),
            **conv_params("conv_3", 1, hidden, hidden),
            **conv_params("conv_5", 1, hidden, hidden),
            **conv_params("conv_7", 3, hidden, image, is_zero=True),
        },
        "band_split": two(()),
        "time": two((depth,)),
        "freq": two((depth,)),
    }


def adapt(
    p: Params, features: Mapping[str, Array], dtype: jnp.dtype, remat: bool = False, deferred: Collection[str] = ()
) -> dict[str, Any]:
    """Adapters on the separator's features: what is added in the refiner, for any noise level and stem. Same shapes.

    Of those named in `deferred`, (parameters, features) that `adapt_tokens` takes, layer by layer. `remat` computes what lies
    inside again in the backward pass.
    """
    tokens: Callable = partial(adapt_tokens, dtype=dtype)
    tokens = jax.checkpoint(tokens) if remat else tokens

    def stacked(axis: str) -> Any:
        both = (p[axis], features[axis])
        if axis in deferred:
            return both
        return map_slices(lambda a: tokens(*a), both, is_fixed=is_narrow(p[axis]["linear_0"]))

    return {
        "stft": _adapt_stft(p["stft"], features["stft"], dtype, remat),
        "band_split": tokens(p["band_split"], features["band_split"]),
        "time": stacked("time"),
        "freq": stacked("freq"),
    }


def adapt_tokens(p: Params, x: Array, dtype: jnp.dtype) -> Array:
    """Two linear layers with a GELU between, (…, dim) -> the same in `dtype`."""
    h = gelu(product(x, p["linear_0"], dtype) + p["linear_0_bias"])
    return (product(h, p["linear_2"], dtype) + p["linear_2_bias"]).astype(dtype)


def _adapt_stft(p: Params, spectrum: Array, dtype: jnp.dtype, remat: bool) -> Array:
    """Convolutions of 3 × 1 × 1 × 3 taps on (batch, frames, bins, channels, 2), zeros around: the same shape, float32.

    Their hidden channels are the widest thing in the network, so they run over some frames at a time.
    """
    batch, frames, bins = spectrum.shape[:3]
    count = -(-frames // FRAMES)
    size = -(-frames // count)

    def direct(x: Array, weight: Array) -> Array:
        dimensions = ("NHWC", "HWIO", "NHWC")  # height is time here
        return lax.conv_general_dilated(x, weight, (1, 1), ((0, 0), (1, 1)), dimension_numbers=dimensions)

    def products(x: Array, weight: Array) -> Array:
        wide, length = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))), x.shape[1] - 2
        shifted = lambda i, j: wide[:, i : i + length, j : j + bins]
        taps: Any = (product(shifted(i, j), weight[i, j], x.dtype) for i in range(3) for j in range(3))
        return sum(taps).astype(x.dtype)

    def conv(x: Array, name: str) -> Array:
        weight = p[name].astype(dtype)
        if weight.shape[0] == 1:
            return product(x, weight[0, 0], dtype) + p[f"{name}_bias"]
        form = differentiated_as(direct, products) if platform() == "cpu" else direct
        return form(x.astype(dtype), weight).astype(jnp.float32) + p[f"{name}_bias"]

    def run(x: Array, start: Array | int) -> Array:
        """Frames from `start` on, out of x that has two more on both sides."""
        for name in ("conv_1", "conv_3", "conv_5"):
            x = gelu(conv(x, name))
        frame = start - 1 + np.arange(size + 2)[:, None, None]
        return conv(jnp.where((frame >= 0) & (frame < frames), x, 0), "conv_7")

    x = jnp.pad(spectrum.reshape(batch, frames, bins, -1), ((0, 0), (2, 2 + count * size - frames), (0, 0), (0, 0)))
    if count == 1:
        return run(x, 0).reshape(spectrum.shape)
    part = lambda start: run(lax.dynamic_slice_in_dim(x, start, size + 4, 1), start)
    y = lax.map(jax.checkpoint(part) if remat else part, jnp.arange(count) * size)
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * size, *spectrum.shape[2:])[:, :frames]


def relay(adapter: Params, factor: float) -> dict[str, Array]:
    """The adapter of the spectrum with its first hidden channels set so that they give back `factor` times what comes in.

    GELU(z) - GELU(-z) is z, and GELU(z) for large z > 0 too: two channels for every one of the image carry it through.
    """
    image = adapter["conv_1"].shape[2]
    own, pair = 2 * image, jnp.concatenate([jnp.eye(image), -jnp.eye(image)], axis=1)  # pair (image, own)
    made = dict(adapter)
    made["conv_1"] = adapter["conv_1"].at[..., :own].set(0).at[1, 1, :, :own].set(pair)
    for name in ("conv_3", "conv_5"):
        made[name] = adapter[name].at[..., :own].set(0).at[0, 0, :own, :own].set(jnp.eye(own))
    for name in ("conv_1_bias", "conv_3_bias", "conv_5_bias"):
        made[name] = adapter[name].at[:own].set(0)
    made["conv_7"] = adapter["conv_7"].at[1, 1, :own].set(factor * pair.T)
    return made


def add_per_mixture(x: Array, injection: Array) -> Array:
    """x + injection (mixtures, …), each mixture's added to all its examples, which are neighbours in x (batch, …)."""
    grouped = x.reshape(len(injection), -1, *x.shape[1:])
    return (grouped + injection[:, None].astype(x.dtype)).reshape(x.shape)
