"""Dropout whose bits are a function of key and place alone, four decisions to a hash.

Bernoulli draws of the size of an attention's logits cost more than the products beside them: a hash of sixty operations for
every decision, and on a TPU its intermediate words in memory. Threefry gives two words of 32 bits, of which 16 decide one
rate to 1 part in 65,536.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from msr_jax.devices import first_example

Array = jax.Array
STEPS = 2**16  # a rate is rounded to a multiple of their inverse
PER_HASH = 4


def split_keys(keys: Array | None, count: int) -> tuple[Array | None, ...]:
    """Each of keys (n,) split in `count`: so many arrays (n,); None for None."""
    if keys is None:
        return (None,) * count
    split = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return tuple(split[:, i] for i in range(count))


def dropout(x: Array, rate: float, keys: Array | None) -> Array:
    """Zero with probability `rate` and scale the rest up; x (batch, sequences, …), keys (sequences,); nothing without keys.

    Every sequence draws from its own key, and example by example: the bits depend on neither the other sequences nor the mesh.
    """
    dropped = round(rate * STEPS)
    if keys is None or not dropped:
        return x
    if dropped == STEPS:
        return jnp.zeros_like(x)
    return jnp.where(_draw(keys, x.shape) >= dropped, x * (STEPS / (STEPS - dropped)), 0)


def _draw(keys: Array, shape: tuple[int, ...]) -> Array:
    """Uniform in 0 … STEPS - 1, (batch, sequences, …) uint32."""
    words = jax.random.key_data(keys)
    # The first axis after the sequences that four divides is drawn as four quarters of it; a copy of the rest would be cut off.
    axis = next((a for a in range(2, len(shape)) if shape[a] % PER_HASH == 0), len(shape) - 1)
    quarter = [*shape[:axis], -(-shape[axis] // PER_HASH), *shape[axis + 1 :]]
    # Place in two words, of the example and within the sequence, which sharding over examples leaves alone.
    example = lax.broadcasted_iota(jnp.uint32, quarter, 0) + jnp.uint32(first_example(shape[0]))
    inside = jnp.zeros(quarter, jnp.uint32)
    for a in range(2, len(quarter)):
        stride = np.uint32(np.prod(quarter[a + 1 :], dtype=np.int64))
        inside += lax.broadcasted_iota(jnp.uint32, quarter, a) * stride
    wide = lambda word: jnp.broadcast_to(word.reshape(1, -1, *[1] * (len(quarter) - 2)), quarter)
    pair = threefry2x32_p.bind(wide(words[:, 0]), wide(words[:, 1]), example, inside)
    parts = [half for word in pair for half in (word & (STEPS - 1), word >> 16)]
    return lax.slice_in_dim(jnp.concatenate(parts, axis), 0, shape[axis], axis=axis)
