"""Single layers: the rewritten convolutions are the convolutions they stand for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from msr_jax.devices import traced_for
from msr_jax.models.initial import draw_marked
from msr_jax.models.layers import GroupNorm, Upsample
from msr_jax.models.products import (
    _convolve_by_products,
    _convolve_directly,
    convolve,
    convolve_frames,
    product,
    product_first,
)
from msr_jax.models.unet1d import patch, unpatch
from msr_jax.train.sharding import AXES


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
    params = draw_marked(jax.random.key(1), layer.init(jax.random.key(0), x)["params"])
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

    direct = lambda x, w: _convolve_directly(x, w, stride, padding)
    products = lambda x, w: _convolve_by_products(x, w, stride, padding)
    chosen = lambda x, w: convolve(x, w, stride, padding, jnp.float32)
    theirs = jax.grad(loss(direct), (0, 1))(x, w)
    for form in (products, chosen):
        np.testing.assert_allclose(form(x, w), direct(x, w), atol=2e-5)
        for a, b in zip(jax.grad(loss(form), (0, 1))(x, w), theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("frames", [1, 5])
def test_convolution_of_frames_is_convolution_of_the_samples_in_them(taps, frames):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, frames * 4, 3)).astype(np.float32)
    w = rng.standard_normal((taps, 3, 2)).astype(np.float32)
    y = unpatch(convolve_frames(patch(x, 4), w, 4, jnp.float32), 4)
    np.testing.assert_allclose(y, convolve(x, w, 1, taps // 2, jnp.float32), atol=1e-5)


def test_gradients_of_a_bfloat16_product_are_products_of_rounded_factors_summed_in_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, [(2, 300, 20), (20, 30), (2, 300, 30)], strict=True))
    _, backward = jax.vjp(lambda x, w: product(x, w, jnp.bfloat16), x, w)
    x_bar, w_bar = backward(g)
    rounded = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(w_bar, np.einsum("bti,bto->io", rounded(x), rounded(g)), rtol=0.01, atol=0.1)
    np.testing.assert_allclose(x_bar, rounded(g) @ rounded(w).T, rtol=0.01, atol=0.05)
    assert x_bar.dtype == w_bar.dtype == jnp.float32


def test_group_norm_of_a_quiet_signal_on_a_large_offset_is_exact():
    x = 30 + 1e-2 * np.random.default_rng(3).standard_normal((2, 4096, 8)).astype(np.float32)
    layer = GroupNorm(2)
    scale, shift = np.full((2, 1, 8), 0.5, np.float32), np.full((2, 1, 8), -1.0, np.float32)
    y = layer.apply(layer.init(jax.random.key(0), x), x, (scale, shift))
    grouped = x.astype(np.float64).reshape(2, 4096, 2, 4)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    expected = centred / np.sqrt(np.square(centred).mean((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, 1.5 * expected.reshape(x.shape) - 1, atol=5e-3)


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_a_product_with_its_columns_first_has_the_gradients_of_the_usual_one(name):
    weight, x = (jax.random.normal(jax.random.key(k), shape) for k, shape in enumerate([(12, 3), (2, 5, 12)]))
    target = jax.random.normal(jax.random.key(2), (3, 2, 5))
    usual = jax.grad(lambda weight, x: (jnp.moveaxis(x @ weight, -1, 0) * target).sum(), (0, 1))(weight, x)
    with traced_for(name):
        ours = jax.grad(lambda weight, x: (product_first(weight, x, jnp.float32) * target).sum(), (0, 1))(weight, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, usual)


def test_a_gpu_s_kernels_keep_their_order_where_no_device_gathers_them():
    x, weight = jnp.ones((1, 8, 2)), jnp.ones((3, 2, 2))

    def constraints(data, fsdp):
        mesh = AbstractMesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2)
        with traced_for("gpu"), jax.sharding.use_abstract_mesh(mesh):
            step = jax.make_jaxpr(jax.grad(lambda w: convolve(x, w, 1, 1, jnp.bfloat16).astype(jnp.float32).sum()))
            return str(step(weight)).count("layout_constraint")

    assert constraints(4, 1) == constraints(1, 1) > 0 == constraints(1, 4)
