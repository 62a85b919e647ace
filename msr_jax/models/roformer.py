"""Transformers of the BS-RoFormer as functions of a dict of parameters; activations (batch, sequences, length, dim).

The batch comes first, so that it stays shared out over devices where axes are merged. The residual stream, norms, rotary
angles and softmax are float32; `dtype` is the precision of matrix products.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from msr_jax.devices import per_example, platform, spread_over
from msr_jax.models.dropout import dropout, split_keys
from msr_jax.models.products import product, product_first

Array = jax.Array
Film = tuple[Array, ...] | None  # scale and shift, each (batch, 1, 1, dim)
# Tokens that go through a transformer at a time, on one device: what a CPU's cache holds beside another call's; on an
# accelerator, enough for its matrix units, while what lies between two products stays small beside what is kept for the gradient.
CHUNK_TOKENS = {"cpu": 2**10, "accelerator": 2**14}
CHUNK_LOGITS = 3 * 2**24  # on an accelerator without a fused kernel, logits of all heads at a time, on one device
SHORT = 128  # sequences up to this length are attended to many at a time
BLOCK = 128  # of a TPU's kernel, tokens and features
BLOCK_LOGITS = 5 * 2**17  # on a CPU in bfloat16, logits at a time: what the cache of its cores holds


class Sizes(NamedTuple):
    """What the functions here must know beside the parameters; dropout rates count only where a key is given.

    `reach`: tokens attend to those at most so far away; 0 is to all.
    """

    heads: int
    dim_head: int
    dtype: jnp.dtype
    attn_dropout: float = 0.0
    ff_dropout: float = 0.0
    remat: bool = False
    reach: int = 0


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
    return x if film is None else features_last(x * (1 + film[0]) + film[1])


def features_last(x: Array) -> Array:
    """x (batch, …), in memory as it is written: features next to each other.

    A GPU's compiler would turn everything between here and the next product the other way round, for the sake of the sums over
    tokens that the gradient of scale and shift takes or of a form of attention, and then find no tiles for the product.
    """
    if platform() != "gpu":
        return x
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    return per_example(lambda x: with_layout_constraint(x, layout), x)  # else all examples would be gathered for it


def rotate(x: Array, angles: Array | np.ndarray) -> Array:
    """Rotary embedding of x (…, length, heads, E) whose pairs are (x[j], x[j + E/2]); angles (length, E/2) float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def attend(q: Array, k: Array, v: Array, rate: float = 0.0, keys: Array | None = None, reach: int = 0) -> Array:
    """softmax(q kᵀ/√E) v for q, k, v (sequences, length, heads, E); float32 or the arguments' dtype.

    `reach`: to tokens at most so far away, for inference: without dropout.

    `keys` of dropout (n,): sequence i has key i mod n. Memory is linear in length where a fused kernel runs (see `is_fused`); on
    a CPU one matrix of logits exists at a time, elsewhere those of the sequences that `transformer` lets through together. No
    logits are kept for the gradient.
    """
    if 0 < reach < q.shape[1] - 1:
        if platform() == "cpu":
            return _attend_on_cpu(q, k, v, reach)
        return features_last(jax.nn.dot_product_attention(q, k, v, local_window_size=reach))
    if keys is not None and rate:
        return jax.checkpoint(partial(_attend_with_dropout, rate=rate), prevent_cse=False)(q, k, v, keys=keys)
    if platform() == "cpu":
        return _attend_on_cpu(q, k, v)
    if is_fused(q.dtype, q.shape[1], q.shape[3], 0.0):
        return _attend_fused(q, k, v) if platform() == "gpu" else _attend_in_blocks(q, k, v)
    # Computed again for the gradient, as a fused kernel does: logits are not kept, whatever the length.
    return features_last(jax.checkpoint(jax.nn.dot_product_attention, prevent_cse=False)(q, k, v))


def is_fused(dtype: jnp.dtype, length: int, features: int, rate: float) -> bool:
    """Whether a kernel serves that never holds the logits: for 16 bits and without dropout, which neither draws from keys of ours.

    cuDNN's on a GPU takes heads of a multiple of 8 features, 128 at most (on an A100). On a TPU the one that comes with JAX takes
    a third of the memory traffic for long sequences, and more than XLA's own products for short ones (by the v5e's compiler).
    """
    if dtype == jnp.float32 or rate:
        return False
    return {"gpu": features % 8 == 0 and features <= 128, "tpu": length > SHORT}.get(platform(), False)


def _attend_in_blocks(q: Array, k: Array, v: Array) -> Array:
    """By the TPU's kernel, which takes whole blocks of tokens and features: the rest is zeros, in a segment of their own."""
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention  # slow to import

    _, length, _, features = q.shape
    padding = ((0, 0), (0, 0), (0, -length % BLOCK), (0, -features % BLOCK))

    def run(*heads_first: Array) -> Array:
        padded = [jnp.pad(a, padding) for a in heads_first]
        segments = (np.arange(padded[0].shape[2]) >= length).astype(np.int32)
        ids = jnp.broadcast_to(segments, (len(padded[0]), len(segments)))
        out = flash_attention(*padded, segment_ids=SegmentIds(ids, ids), sm_scale=features**-0.5)
        return out[:, :, :length, :features]

    return per_example(run, *(a.swapaxes(1, 2) for a in (q, k, v)), is_kernel=True).swapaxes(1, 2)


@jax.custom_vjp
def _attend_fused(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _attend_even(q: Array, k: Array, v: Array) -> Array:
    """The same for lengths that are made even by a token that nobody attends to: the kernel's gradient takes no others."""
    length = q.shape[1]
    if length % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (q, k, v))
    lengths = jnp.full(len(q), length, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


_attend_fused.defvjp(lambda q, k, v: jax.vjp(_attend_even, q, k, v), lambda pull_back, cotangent: pull_back(cotangent))


def _softmax_numerators(q: Array, k: Array, batch: tuple[int, ...], near: Array | None = None) -> Array:
    """Of the softmax over keys, or those that are `near`, float32; axes (*batch, length, E) to (*batch, queries, keys)."""
    last = len(batch) + 1
    logits = lax.dot_general(q, k, (((last,), (last,)), (batch, batch)), preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    logits = logits if near is None else jnp.where(near, logits, -jnp.inf)
    return jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))


def _mixed_on_cpu(q: Array, k: Array, v: Array, batch: tuple[int, ...], near: Array | None = None) -> Array:
    # The sum is that of the weights as they are multiplied: what rounding took is taken from both.
    weights = _softmax_numerators(q, k, batch, near).astype(v.dtype)
    axis = len(batch)
    mixed = lax.dot_general(weights, v, (((axis + 1,), (axis,)), (batch, batch)), preferred_element_type=jnp.float32)
    return mixed / weights.astype(jnp.float32).sum(-1, keepdims=True)


def _one_by_one(function: Callable[..., Array], q: Array, k: Array, v: Array) -> Array:
    """function((length, E), …) of every sequence and head of (sequences, length, heads, E).

    XLA's own form of batched products leaves a CPU idle: for long sequences, a loop over plain ones is 4 to 5 times
    faster than `jax.nn.dot_product_attention`, and its logits stay in the cache.
    """
    sequences, length, heads, features = q.shape
    flat = [a.swapaxes(1, 2).reshape(sequences * heads, length, features) for a in (q, k, v)]
    mixed = lax.map(jax.checkpoint(lambda a: function(*a)), tuple(flat))
    return mixed.reshape(sequences, heads, length, features).swapaxes(1, 2)


def _near(queries: range, keys: range, reach: int) -> Array | None:
    """Which keys are at most `reach` away: (queries, keys), or None for all."""
    if not reach:
        return None
    # Made where it runs: as a constant it would be as large as the program.
    query, key = (lax.broadcasted_iota(jnp.int32, (len(queries), len(keys)), axis) for axis in (0, 1))
    return jnp.abs(queries.start + query - (keys.start + key)) <= reach


def _attend_on_cpu(q: Array, k: Array, v: Array, reach: int = 0) -> Array:
    """Short sequences many at a time, longer ones piece by piece, each with all tokens that it reaches."""
    length = q.shape[1]
    if length <= SHORT:
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
        return _mixed_on_cpu(q, k, v, (0, 1), _near(range(length), range(length), reach)).swapaxes(1, 2)
    if reach:
        size = max(SHORT, -(-reach // 2))  # as fast as any; smaller ones take longer to compile
    elif v.dtype == jnp.float32:
        size = length  # a product takes so long that the cache does not matter
    else:
        size = -(-length // -(-(length**2) // BLOCK_LOGITS))

    def one(q: Array, k: Array, v: Array) -> Array:
        mixed = []
        for start in range(0, length, size):
            queries = range(start, min(length, start + size))
            keys = range(max(0, start - reach), min(length, queries.stop + reach)) if reach else range(length)
            of_keys = slice(keys.start, keys.stop)
            near = _near(queries, keys, reach)
            mixed.append(_mixed_on_cpu(q[start : queries.stop], k[of_keys], v[of_keys], (), near))
        return jnp.concatenate(mixed)

    return _one_by_one(one, q, k, v)


def _attend_with_dropout(q: Array, k: Array, v: Array, rate: float, keys: Array) -> Array:
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    weights = _softmax_numerators(q, k, (0, 1))
    by_sequence = (weights / weights.sum(-1, keepdims=True)).reshape(-1, len(keys), *weights.shape[1:])
    weights = dropout(by_sequence, rate, keys).reshape(weights.shape).astype(v.dtype)
    dimensions = (((3,), (2,)), ((0, 1), (0, 1)))
    return lax.dot_general(weights, v, dimensions, preferred_element_type=jnp.float32).swapaxes(1, 2)


def attention(p: Mapping[str, Array], h: Array, film: Film, sizes: Sizes, keys: Array | None) -> Array:
    """Gated rotary self-attention over the length of h (batch, sequences, length, dim), without the residual."""
    batch, sequences, length, dim = h.shape
    heads, features = sizes.heads, sizes.dim_head
    width = heads * features
    keys_weights, keys_out = split_keys(keys, 2)
    u = modulate(rms_norm(h, p["norm"]), film)
    # The published pairs are neighbours (2j, 2j + 1). Sorted into halves, q and k have the same products and the
    # rotation runs over whole vectors.
    weight = p["to_qkv"].reshape(dim, 3, heads, features // 2, 2)
    sorted_halves = weight[:, :2].swapaxes(-1, -2).reshape(dim, -1)
    weight = jnp.concatenate([sorted_halves, p["to_qkv"][:, 2 * width :]], axis=1)
    wide = features_last(product(u, weight, sizes.dtype))
    qk = wide[..., : 2 * width].reshape(-1, length, 2, heads, features)
    v = wide[..., 2 * width :].reshape(-1, length, heads, features)
    if "to_qkv_bias" in p:
        bias = p["to_qkv_bias"].reshape(3, heads, features)
        halves = bias[:2].reshape(2, heads, features // 2, 2).swapaxes(-1, -2)
        qk, v = qk + halves.reshape(2, heads, features), v + bias[2]
    angles = np.arange(length, dtype=np.float32)[:, None] * lax.stop_gradient(p["freqs"])
    q, k = (rotate(qk[:, :, i], angles).astype(sizes.dtype) for i in (0, 1))
    mixed = attend(q, k, v.astype(sizes.dtype), sizes.attn_dropout, keys_weights, sizes.reach)
    gates = jax.nn.sigmoid(product_first(p["to_gates"], u, sizes.dtype) + p["to_gates_bias"].reshape(-1, 1, 1, 1))
    mixed = mixed * jnp.moveaxis(gates, 0, -1).reshape(-1, length, heads, 1)
    out = product(mixed.reshape(batch, sequences, length, heads * features), p["to_out"], sizes.dtype)
    out = out + p["to_out_bias"] if "to_out_bias" in p else out
    return dropout(out, sizes.attn_dropout, keys_out)


def linear_attention(p: Mapping[str, Array], h: Array, film: Film, sizes: Sizes, keys: Array | None) -> Array:
    """Attention between features instead of tokens: its matrices are (E, E), whatever the length."""
    batch, sequences, length, _ = h.shape
    u = modulate(rms_norm(h, p["norm"]), film)
    qkv = product(u, p["to_qkv"], sizes.dtype).reshape(batch, sequences, length, 3, sizes.heads, sizes.dim_head)
    q, k, v = (qkv[..., i, :, :].astype(jnp.float32) for i in range(3))
    unit = lambda x: x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(2, keepdims=True), 1e-24))  # along the tokens
    q = unit(q) * jnp.exp(p["temperature"]).reshape(-1, 1)
    logits = 8 * jnp.einsum("bsnhe,bsnhf->bshef", q, unit(k))
    weights = dropout(jax.nn.softmax(logits, axis=-1), sizes.attn_dropout, keys)
    mixed = jnp.einsum("bshef,bsnhf->bsnhe", weights, v)
    return product(mixed.reshape(batch, sequences, length, -1), p["to_out"], sizes.dtype)


def feed_forward(p: Mapping[str, Array], h: Array, film: Film, sizes: Sizes, keys: Array | None) -> Array:
    """Norm, linear to four times the width, exact GELU, linear back; without the residual."""
    keys_hidden, keys_out = split_keys(keys, 2)
    u = modulate(rms_norm(h, p["norm"]), film)
    hidden = dropout(gelu(product(u, p["to_hidden"], sizes.dtype) + p["to_hidden_bias"]), sizes.ff_dropout, keys_hidden)
    return dropout(product(hidden, p["to_out"], sizes.dtype) + p["to_out_bias"], sizes.ff_dropout, keys_out)


def transformer(
    blocks: list[tuple[Mapping, Mapping]], h: Array, films: list[tuple[Film, ...]], sizes: Sizes, key: Array | None
) -> Array:
    """Blocks of attention and feed-forward, each with its residual, over the length of h (batch, sequences, length, dim).

    The residual stream is float32; what the blocks read of it, and what is kept for their gradient, is `dtype`. Sequences do
    not meet: they go through a few at a time, so that what lies between two products stays small. Examples always go through
    together, each on the device that has it. Dropout draws for every sequence from a key of its own: its bits depend neither
    on how many go together nor on the mesh.
    """

    def run(blocks: Any, films: Any, narrow: Array, keys: Array | None) -> Array:
        """What the blocks add to h."""
        narrow, added = features_last(narrow), jnp.zeros((), jnp.float32)
        for (attend_p, feed_p), (attend_film, feed_film) in zip(blocks, films, strict=True):
            keys, keys_a, keys_f = split_keys(keys, 3)
            mix = linear_attention if "temperature" in attend_p else attention
            added = added + mix(attend_p, narrow + added, attend_film, sizes, keys_a)
            added = added + feed_forward(feed_p, narrow + added, feed_film, sizes, keys_f)
        return features_last(added)

    if sizes.remat:  # what lies inside of a transformer, for the sequences in hand, is computed again for the gradient
        run = jax.checkpoint(run, prevent_cse=False)

    def all_chunks(blocks: Any, keys: Array | None, narrow: Array, films: Any) -> Array:
        if "temperature" in blocks[0][0] and platform() != "cpu":
            return run(blocks, films, narrow, keys)
        size = _together(len(narrow), narrow.shape[2], sizes, keys is not None)
        return map_chunks(partial(run, blocks, films), narrow, size, keys)

    keys = None if key is None else jax.random.split(key, h.shape[1])
    if spread_over() > 1 and len(h) % spread_over() == 0:
        # Each device sums the gradient of its examples over all chunks before it is sent, in the precision of the products.
        cast = lambda p: p.astype(sizes.dtype) if p.ndim > 1 else p
        blocks = jax.tree.map(cast, blocks)
    return h + per_example(all_chunks, h.astype(sizes.dtype), films, whole=(blocks, keys), is_kernel=True)


def _together(batch: int, length: int, sizes: Sizes, is_dropping: bool) -> int:
    """How many sequences of each example go through a transformer at a time."""
    if platform() == "cpu":
        return max(1, CHUNK_TOKENS["cpu"] // (batch * length))
    local = -(-batch // spread_over())
    size = CHUNK_TOKENS["accelerator"] // (local * length)
    is_near = 0 < sizes.reach < length - 1
    if is_near or not is_fused(sizes.dtype, length, sizes.dim_head, sizes.attn_dropout if is_dropping else 0.0):
        size = min(size, CHUNK_LOGITS // (local * sizes.heads * length**2))
    return max(1, size)


def map_chunks(run: Callable[[Array, Array | None], Array], x: Array, size: int, keys: Array | None) -> Array:
    """run(x[:, i : i + size], keys[i : i + size]) one after another, joined along the second axis; the last is filled up with
    zeros.
    """
    batch, sequences = x.shape[:2]
    count = -(-sequences // size)
    if count == 1:
        return run(x, keys)
    size = -(-sequences // count)
    missing = count * size - sequences
    padded = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    parts = jnp.moveaxis(padded.reshape(batch, count, size, *x.shape[2:]), 1, 0)
    if keys is None:
        y = lax.map(lambda part: run(part, None), parts)
    else:
        filled = jnp.concatenate([keys, keys[:missing]]).reshape(count, size)
        y = lax.map(lambda part: run(*part), (parts, filled))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(batch, count * size, *y.shape[3:])[:, :sequences]
