"""Dropout: its rate and scale are exact, and what it draws depends on key and place alone."""

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
