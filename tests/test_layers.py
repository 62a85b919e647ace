"""Single layers: the rewritten convolutions are the convolutions they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.models.layers import Upsample, _convolve_by_products, convolve


def transposed_convolution(x, weight, bias, f):
    """The defining sum, sample by sample."""
    batch, length, _ = x.shape
    taps = weight.shape[0]
    padding = f // 2 + f % 2
    y = np.tile(bias, (batch, f * length, 1))
    for t in range(f * length):
        for j in range(length):
            if 0 <= t + padding - j * f < taps:
                y[:, t] += x[:, j] @ weight[t + padding - j * f]
    return y


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_upsampling_is_the_transposed_convolution(factor):
    x = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    layer = Upsample(3, factor)
    params = layer.init(jax.random.key(0), x)["params"]
    expected = transposed_convolution(x, np.asarray(params["weight"]), np.asarray(params["bias"]), factor)
    y = layer.apply({"params": params}, x)
    assert y.shape == (2, 7 * factor, 3)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("taps,stride,padding", [(3, 1, 1), (9, 4, 4), (5, 2, 2), (7, 3, 3)])
def test_convolution_by_matrix_products_equals_the_direct_form(taps, stride, padding):
    rng = np.random.default_rng(1)
    x, w = (
        rng.standard_normal((2, 24, 6)).astype(np.float32),
        rng.standard_normal((taps, 6, 5)).astype(np.float32),
    )

    def loss(form):
        return lambda x, w: jnp.sin(form(x, w)).sum()

    direct = lambda x, w: convolve(x, w, stride, padding, jnp.float32)
    products = lambda x, w: _convolve_by_products(x, w, stride, padding)
    np.testing.assert_allclose(products(x, w), direct(x, w), atol=2e-5)
    for ours, theirs in zip(jax.grad(loss(products), (0, 1))(x, w), jax.grad(loss(direct), (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5)
