"""Loops over bfloat16 arrays on a CPU: the same numbers, and no float32 copy of what they run over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.audio.devices import traced_for
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.models.slices import map_slices, only_after, scan_slices
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


@pytest.mark.parametrize("is_ordered", [False, True])
def test_what_waits_for_something_else_is_the_same_and_not_held_beside_it(is_ordered, bfloat16_units):
    """Twenty networks of two layers on one input, their weights stored as bits, as mask heads are."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 64, 64)) / 8, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((256, 64)), jnp.bfloat16)

    def run(bits, x, is_ordered):
        found = []
        for k in range(20):
            inputs = [jax.lax.bitcast_convert_type(b[k], jnp.bfloat16) for b in bits], x
            (one, two), y = only_after(found[-1], inputs) if found and is_ordered else inputs
            found.append(jnp.tanh(y @ one) @ two)
        return jnp.concatenate(found)

    bits = jax.lax.bitcast_convert_type(weights, jnp.uint16)
    lowered = {k: jax.jit(run, static_argnums=2).lower(bits, x, k).compile() for k in (False, is_ordered)}
    np.testing.assert_array_equal(lowered[False](bits, x), lowered[is_ordered](bits, x))
    if is_ordered:
        held = {k: c.memory_analysis().temp_size_in_bytes for k, c in lowered.items()}
        assert held[True] < 0.7 * held[False]
