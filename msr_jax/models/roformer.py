"""Transformers of the BS-RoFormer as functions of a dict of parameters; activations (batch, sequences, length, dim).

The batch comes first, so that it stays shared out over devices where axes are merged. The residual stream, norms, rotary
angles and softmax are float32; `dtype` is the precision of matrix products.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msr_jax.models.layers import product
from msr_jax.models.platform import platform

Array = jax.Array
Film = tuple[Array, ...] | None  # scale and shift, each (batch, 1, 1, dim)
CHUNK_TOKENS = 4096  # on a CPU, tokens that go through a transformer at a time: what its caches hold
CHUNK_LOGITS = 2**23  # on an accelerator without a fused kernel, logits of one head and example at a time
SHORT = 128  # sequences up to this length are attended to many at a time


class Sizes(NamedTuple):
    """What the functions here must know beside the parameters; dropout rates count only where a key is given."""

    heads: int
    dim_head: int
    dtype: jnp.dtype
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    remat: bool = False


def gelu(x: Array) -> Array:
    """Exact GELU in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False)


def rms_norm(x: Array, gamma: Array) -> Array:
    """√n · gamma · x / max(‖x‖, 1e-12) over the last axis of n, float32; zero stays zero, with finite gradients."""
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squares, 1e-24)) * (x.shape[-1] ** 0.5 * gamma)


def modulate(x: Array, film: Film) -> Array:
    """x · (1 + scale) + shift, or x."""
    return x if film is None else x * (1 + film[0]) + film[1]


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero with probability `rate` and scale the rest up; nothing without a key."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def rotate(x: Array, angles: Array | np.ndarray) -> Array:
    """Rotary embedding of x (…, length, heads, E) whose pairs are (x[j], x[j + E/2]); angles (length, E/2) float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def attend(q: Array, k: Array, v: Array, rate: float = 0.0, key: Array | None = None) -> Array:
    """softmax(q kᵀ/√E) v for q, k, v (sequences, length, heads, E), full; float32 or the arguments' dtype.

    Memory is linear in length where the fused kernel runs (a GPU, 16 bits, no dropout); on a CPU one matrix of logits
    exists at a time, elsewhere those of the sequences that `transformer` lets through together. No logits are kept for
    the gradient.
    """
    if key is not None and rate:
        return jax.checkpoint(partial(_attend_with_dropout, rate=rate), prevent_cse=False)(q, k, v, key=key)
    if platform() == "cpu":
        return _attend_on_cpu(q, k, v)
    if _is_fused(q.dtype, 0.0):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    # Computed again for the gradient, as a fused kernel does: logits are not kept, whatever the length.
    return jax.checkpoint(jax.nn.dot_product_attention, prevent_cse=False)(q, k, v)


def _is_fused(dtype: jnp.dtype, rate: float) -> bool:
    return platform() == "gpu" and dtype != jnp.float32 and not rate


def _softmax_parts(q: Array, k: Array, batch: tuple[int, ...]) -> tuple[Array, Array]:
    """Numerators (float32) and their sums, of the softmax over keys; axes (*batch, length, E)."""
    last = len(batch) + 1
    logits = lax.dot_general(q, k, (((last,), (last,)), (batch, batch)), preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    return weights, weights.sum(-1, keepdims=True)


def _attend_on_cpu(q: Array, k: Array, v: Array) -> Array:
    # XLA's own form of batched products leaves a CPU idle: for long sequences, a loop over plain ones is 4 to 5 times
    # faster than `jax.nn.dot_product_attention`, and its logits stay in the cache.
    sequences, length, heads, features = q.shape
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))

    def form(q: Array, k: Array, v: Array, batch: tuple[int, ...]) -> Array:
        weights, total = _softmax_parts(q, k, batch)
        axis = len(batch)
        dimensions = (((axis + 1,), (axis,)), (batch, batch))
        mixed = lax.dot_general(weights.astype(v.dtype), v, dimensions, preferred_element_type=jnp.float32)
        return mixed / total

    if length <= SHORT:
        return form(q, k, v, (0, 1)).swapaxes(1, 2)
    flat = [a.reshape(sequences * heads, length, features) for a in (q, k, v)]
    mixed = lax.map(jax.checkpoint(lambda a: form(a[0], a[1], a[2], ())), tuple(flat))
    return mixed.reshape(sequences, heads, length, features).swapaxes(1, 2)


def _attend_with_dropout(q: Array, k: Array, v: Array, rate: float, key: Array) -> Array:
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    weights, total = _softmax_parts(q, k, (0, 1))
    weights = dropout(weights / total, rate, key).astype(v.dtype)
    dimensions = (((3,), (2,)), ((0, 1), (0, 1)))
    return lax.dot_general(weights, v, dimensions, preferred_element_type=jnp.float32).swapaxes(1, 2)


def attention(p: Mapping[str, Array], h: Array, film: Film, sizes: Sizes, key: Array | None) -> Array:
    """Gated rotary self-attention over the length of h (batch, sequences, length, dim), without the residual."""
    batch, sequences, length, dim = h.shape
    heads, features = sizes.heads, sizes.dim_head
    key_weights, key_out = (None, None) if key is None else jax.random.split(key)
    u = modulate(rms_norm(h, p["norm"]), film)
    # The published pairs are neighbours (2j, 2j + 1). Sorted into halves, q and k have the same products and the
    # rotation runs over whole vectors.
    weight = p["to_qkv"].reshape(dim, 3, heads, features // 2, 2)
    sorted_halves = weight[:, :2].swapaxes(-1, -2).reshape(dim, -1)
    qk = product(u, sorted_halves, sizes.dtype).reshape(-1, length, 2, heads, features)
    v = product(u, p["to_qkv"][:, 2 * heads * features :], sizes.dtype).reshape(-1, length, heads, features)
    if "to_qkv_bias" in p:
        bias = p["to_qkv_bias"].reshape(3, heads, features)
        halves = bias[:2].reshape(2, heads, features // 2, 2).swapaxes(-1, -2)
        qk, v = qk + halves.reshape(2, heads, features), v + bias[2]
    angles = np.arange(length, dtype=np.float32)[:, None] * lax.stop_gradient(p["freqs"])
    q, k = (rotate(qk[:, :, i], angles).astype(sizes.dtype) for i in (0, 1))
    mixed = attend(q, k, v.astype(sizes.dtype), sizes.attn_dropout, key_weights)
    gates = jax.nn.sigmoid(product(u, p["to_gates"], sizes.dtype) + p["to_gates_bias"])
    mixed = mixed * gates.reshape(-1, length, heads, 1)
    out = product(mixed.reshape(batch, sequences, length, heads * features), p["to_out"], sizes.dtype)
    out = out + p["to_out_bias"] if "to_out_bias" in p else out
    return dropout(out, sizes.attn_dropout, key_out)


def linear_attention(p: Mapping[str, Array], h: Array, film: Film, sizes: Sizes, key: Array | None) -> Array:
    """Attention between features instead of tokens: its matrices are (E, E), whatever the length."""
    batch, sequences, length, _ = h.shape
    u = modulate(rms_norm(h, p["norm"]), film)
    qkv = product(u, p["to_qkv"], sizes.dtype).reshape(batch, sequences, length, 3, sizes.heads, sizes.dim_head)
    q, k, v = (qkv[..., i, :, :].astype(jnp.float32) for i in range(3))
    unit = lambda x: x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(2, keepdims=True), 1e-24))  # along the tokens
    q = unit(q) * jnp.exp(p["temperature"]).reshape(-1, 1)
    logits = 8 * jnp.einsum("bsnhe,bsnhf->bshef", q, unit(k))
    weights = dropout(jax.nn.softmax(logits, axis=-1), sizes.attn_dropout, key)
    mixed = jnp.einsum("bshef,bsnhf->bsnhe", weights, v)
    return product(mixed.reshape(batch, sequences, length, -1), p["to_out"], sizes.dtype)


def feed_forward(p: Mapping[str, Array], h: Array, film: Film, sizes: Sizes, key: Array | None) -> Array:
    """Norm, linear to four times the width, exact GELU, linear back; without the residual."""
    key_hidden, key_out = (None, None) if key is None else jax.random.split(key)
    u = modulate(rms_norm(h, p["norm"]), film)
    hidden = dropout(gelu(product(u, p["to_hidden"], sizes.dtype) + p["to_hidden_bias"]), sizes.ff_dropout, key_hidden)
    return dropout(product(hidden, p["to_out"], sizes.dtype) + p["to_out_bias"], sizes.ff_dropout, key_out)


def transformer(
    blocks: list[tuple[Mapping, Mapping]], h: Array, films: list[tuple[Film, ...]], sizes: Sizes, key: Array | None
) -> Array:
    """Blocks of attention and feed-forward, each with its residual, over the length of h (batch, sequences, length, dim).

    Sequences do not meet: where caches or memory ask for it they go through a few at a time, so that what lies between
    two products stays small. Examples always go through together, each on the device that has it.
    """

    def run(h: Array, key: Array | None) -> Array:
        for (attend_p, feed_p), (attend_film, feed_film) in zip(blocks, films, strict=True):
            key, key_a, key_f = (None, None, None) if key is None else jax.random.split(key, 3)
            mix = linear_attention if "temperature" in attend_p else attention
            h = h + mix(attend_p, h, attend_film, sizes, key_a)
            h = h + feed_forward(feed_p, h, feed_film, sizes, key_f)
        return h

    if sizes.remat:  # what lies inside of a transformer, for the sequences in hand, is computed again for the gradient
        run = jax.checkpoint(run, prevent_cse=False)
    batch, _, length, _ = h.shape
    if platform() == "cpu":
        return map_chunks(run, h, max(1, CHUNK_TOKENS // (batch * length)), key)
    if _is_fused(sizes.dtype, sizes.attn_dropout if key is not None else 0.0) or "temperature" in blocks[0][0]:
        return run(h, key)
    return map_chunks(run, h, max(1, CHUNK_LOGITS // length**2), key)


def map_chunks(run: Callable[[Array, Array | None], Array], x: Array, size: int, key: Array | None) -> Array:
    """run(x[:, i : i + size], key of i) one after another, joined along the second axis; the last is filled up with zeros."""
    batch, sequences = x.shape[:2]
    count = -(-sequences // size)
    if count == 1:
        return run(x, key)
    size = -(-sequences // count)
    padded = jnp.pad(x, [(0, 0), (0, count * size - sequences)] + [(0, 0)] * (x.ndim - 2))
    parts = jnp.moveaxis(padded.reshape(batch, count, size, *x.shape[2:]), 1, 0)
    if key is None:
        y = lax.map(lambda part: run(part, None), parts)
    else:
        y = lax.map(lambda part: run(*part), (parts, jax.random.split(key, count)))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(batch, count * size, *y.shape[3:])[:, :sequences]
