"""Initial parameters: their distributions, and that no draw is used twice."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from msr_jax.models.initial import draw_marked, normal, uniform_fan


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, (8,))
        frequencies = self.param("frequencies", normal, (20_000,))
        weight = self.param("weight", uniform_fan(16), (16, 1000))
        return x + gain.sum() + frequencies.sum() + (weight + self.param("bias", uniform_fan(16), (1000,))).sum()


def drawn(key):
    return draw_marked(key, Layer().init(jax.random.key(0), jnp.zeros(()))["params"])


def test_parameters_follow_the_distributions_that_their_initialisers_name():
    params = drawn(jax.random.key(1))
    np.testing.assert_array_equal(params["gain"], 1)
    weight, frequencies = np.asarray(params["weight"]), np.asarray(params["frequencies"])
    assert np.abs(weight).max() <= 0.25 and abs(weight.std() / (0.25 / np.sqrt(3)) - 1) < 0.02
    assert abs(frequencies.mean()) < 0.03 and abs(frequencies.std() - 1) < 0.02 and np.abs(frequencies).max() > 3
    assert np.abs(params["bias"]).max() > 0


def test_no_two_parameters_share_their_values_and_another_key_gives_others():
    params, other = drawn(jax.random.key(1)), drawn(jax.random.key(2))
    assert abs(np.corrcoef(params["weight"][0], params["bias"])[0, 1]) < 0.15
    for name in ("weight", "bias", "frequencies"):
        assert not np.any(np.asarray(params[name]) == np.asarray(other[name]))


def test_a_tree_without_marks_stays_as_it_is():
    tree = {"a": jnp.arange(3.0)}
    assert draw_marked(jax.random.key(0), tree)["a"] is tree["a"]
