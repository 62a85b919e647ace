"""Loops over bfloat16 arrays on a CPU: the same numbers, and no float32 copy of what they run over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.devices import traced_for
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.models.slices import map_slices, scan_slices
from tests.test_bs_roformer import SIZES

XS = {"a": jnp.arange(24, dtype=jnp.bfloat16).reshape(4, 6) / 7, "b": jnp.arange(4.0)}


def body(total, x):
    return total + x["b"], {"wide": x["a"].astype(jnp.float32) * x["b"], "narrow": x["a"] * 2}


def test_a_loop_over_bits_gives_what_a_loop_gives():
    expected = jax.lax.scan(body, 0.0, XS)
    found = scan_slices(body, 0.0, XS, is_fixed=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, expected)


def test_gradients_go_through_a_loop_that_is_not_fixed():
    double = lambda xs: map_slices(lambda x: 2 * x["a"] * x["b"].astype(jnp.bfloat16), xs, is_fixed=False)
    gradient = jax.grad(lambda xs: double(xs).astype(jnp.float32).sum())(XS)["a"]
    np.testing.assert_array_equal(gradient, 2 * XS["b"][:, None].repeat(6, 1))


def test_a_gradient_through_bits_is_an_error_and_not_zero():
    with pytest.raises(TypeError, match="stored in bfloat16 has no gradient on a CPU"):
        jax.grad(lambda a: scan_slices(body, 0.0, {**XS, "a": a}, is_fixed=True)[1]["wide"].sum())(XS["a"])


def test_a_networks_stacks_stay_narrow_and_accelerators_get_them_as_they_are(bfloat16_units):
    network = make_backbone({**SIZES, "depth": 3}, "bfloat16")
    params = network.init(jax.random.key(0), False)
    stored = cast_params(params, "bfloat16", network.looped)
    stack = stored["layers"]["time_0"]["attention"]["to_qkv"]
    assert stack.dtype == jnp.uint16
    x = 0.1 * jax.random.normal(jax.random.key(1), (1, 640, 2))
    separate = jax.jit(lambda p, x: network.separate(p, x)[0]).lower(stored, x).compile()
    assert f"f32[{','.join(map(str, stack.shape))}]" not in separate.as_text()
    as_numbers = cast_params(params, "bfloat16")
    np.testing.assert_array_equal(separate(stored, x), network.separate(as_numbers, x)[0])
    with traced_for("gpu"):
        assert jax.tree.leaves(cast_params(params["layers"], "bfloat16", ("time",)))[0].dtype != jnp.uint16
