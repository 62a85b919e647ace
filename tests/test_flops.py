"""The count of operations is that of the products there are, loops with every turn."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from msr_jax.bench.roformers import count_flops as of_the_formula
from msr_jax.config import bsrf_base
from msr_jax.models.backbone import make_backbone
from msr_jax.plan.flops import count_flops

x, w = jnp.ones((5, 3)), jnp.ones((3, 3))


def count(f, *args):
    return count_flops(jax.make_jaxpr(f)(*args))


def test_products_count_two_for_each_factor_and_loops_every_turn():
    assert count(jnp.dot, x, w) == 2 * 5 * 3 * 3
    assert count(lambda x: lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0], x) == 7 * 90
    assert count(jax.jit(lambda x: lax.map(lambda row: row @ w, x)), x) == 90
    assert count(lambda x: lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x), x) == 180


def test_a_gradient_costs_both_products_again_and_recomputation_once_more():
    loss = lambda w: jnp.square(jnp.tanh(x @ w) @ w).sum()
    assert count(jax.grad(loss), w) == 5 * 90  # nothing is sent back to x
    assert count(jax.grad(jax.checkpoint(loss)), w) == 7 * 90  # both products once more


def test_convolutions_count_their_taps():
    y = jnp.ones((2, 8, 4))
    f = lambda y, k: lax.conv_general_dilated(y, k, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
    kernel = jnp.ones((3, 4, 6))
    assert count(f, y, kernel) == 2 * (2 * 3 * 6) * (3 * 4)


@pytest.mark.parametrize("samples", [132_300, 485_100])  # the crop of short training, and the official segment
def test_a_pass_of_the_official_bs_roformer_costs_what_its_formula_says(samples):
    sizes = bsrf_base().model.to_dict()
    backbone = make_backbone(sizes)
    params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), False))
    mixture = jax.ShapeDtypeStruct((1, samples, 2), jnp.float32)
    found = count_flops(jax.make_jaxpr(lambda p, m: backbone.separate(p, m)[0])(params, mixture))
    assert found == pytest.approx(of_the_formula(sizes, samples), rel=0.02)  # chunks are filled up
