"""Dropout: its rate and scale are exact, and what it draws depends on key and place alone."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.models.dropout import dropout, split_keys

KEYS = jax.random.split(jax.random.key(0), 6)


@pytest.mark.parametrize("shape", [(2, 6, 8, 30, 30), (3, 6, 50, 64), (2, 6, 3, 33, 31)])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_values_are_dropped_at_the_rate_and_the_rest_scaled_up(shape, rate):
    y = np.asarray(dropout(jnp.ones(shape), rate, KEYS))
    count = y.size
    assert abs((y == 0).mean() - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=2e-5)


def test_without_keys_or_at_rate_0_nothing_happens_and_at_rate_1_nothing_is_left():
    x = jnp.arange(48.0).reshape(2, 6, 4)
    np.testing.assert_array_equal(dropout(x, 0.3, None), x)
    np.testing.assert_array_equal(dropout(x, 0.0, KEYS), x)
    assert not np.any(dropout(x, 1.0, KEYS))


def test_a_sequence_draws_the_same_whatever_goes_with_it():
    x = jnp.ones((3, 6, 8, 20))
    whole = dropout(x, 0.3, KEYS)
    np.testing.assert_array_equal(dropout(x[:, 2:4], 0.3, KEYS[2:4]), whole[:, 2:4])
    np.testing.assert_array_equal(dropout(x[:1], 0.3, KEYS), whole[:1])


def test_sequences_examples_and_the_words_of_a_hash_draw_independently():
    drops = np.asarray(dropout(jnp.ones((4, 6, 4, 500)), 0.5, KEYS) == 0).reshape(-1, 500) - 0.5
    correlation = drops @ drops.T / (0.25 * 500)
    assert np.abs(correlation - np.eye(len(drops))).max() < 6 / 500**0.5


def test_split_keys_are_all_different():
    words = np.concatenate([jax.random.key_data(k) for k in split_keys(KEYS, 3)])
    assert len(np.unique(words, axis=0)) == 18
    assert split_keys(None, 2) == (None, None)


ON_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from msr_jax.models.roformer import Sizes, transformer
from msr_jax.train.sharding import batch_sharding, make_mesh

draw = lambda k, *shape: 0.3 * jax.random.normal(jax.random.key(k), shape)
attention = {"norm": 1 + draw(0, 8), "to_qkv": draw(1, 8, 24), "to_gates": draw(2, 8, 2), "to_gates_bias": draw(3, 2)}
attention |= {"freqs": 1 + draw(4, 2), "to_out": draw(5, 8, 8)}
feed = {"norm": 1 + draw(6, 8), "to_hidden": draw(7, 8, 32), "to_hidden_bias": draw(8, 32)}
feed |= {"to_out": draw(9, 32, 8), "to_out_bias": draw(10, 8)}
sizes = Sizes(2, 4, jnp.dtype("float32"), 0.2, 0.2, remat=True)

def loss(blocks, h):
    return jnp.square(transformer(blocks, h, [(None, None)], sizes, jax.random.key(11))).mean()

mesh, h = make_mesh({"data": 2, "fsdp": 2}), draw(12, 4, 3, 5, 8)
run = jax.jit(jax.value_and_grad(loss))
one = run([(attention, feed)], h)
with jax.set_mesh(mesh):
    four = run([(attention, feed)], jax.device_put(h, batch_sharding(mesh)))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one, four)
"""


def test_a_transformer_drops_the_same_on_four_devices_as_on_one():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
