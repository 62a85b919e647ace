"""The U-Net: size, initialisation, precision, recomputation, conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.devices import traced_for
from msr_jax.errors import UserError
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.models.unet1d import patch, unpatch
from tests.conftest import TINY_SIZES


def inputs(backbone, batch=2, seed=0):
    x = jax.random.normal(jax.random.key(seed), (batch, 4 * backbone.length_multiple, 1))
    return x, jnp.eye(4)[jnp.arange(batch) % 4]


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_the_official_networks_have_the_published_numbers_of_parameters():
    backbone = make_backbone({"name": "unet1d"})
    assert count(jax.eval_shape(lambda: backbone.init(jax.random.key(0), False))) == 405_231_900
    assert count(jax.eval_shape(lambda: backbone.init(jax.random.key(0), True))) == 405_496_220
    assert backbone.length_multiple == 8192


def test_initialisation_is_uniform_by_fan_with_unit_norms(tiny_backbone):
    params = tiny_backbone.init(jax.random.key(0), True)
    conv = params["downsamples_0"]["downsample"]
    bound = 1 / np.sqrt(5 * 16)
    for leaf in (conv["weight"], conv["bias"]):
        assert np.abs(leaf).max() <= bound
    assert np.std(conv["weight"]) == pytest.approx(bound / np.sqrt(3), rel=0.05)
    up = params["upsamples_0"]["upsample"]["weight"]  # a transposed convolution counts its outputs
    assert np.abs(up).max() <= 1 / np.sqrt(16 * 4) and np.abs(up).max() > 0.97 / np.sqrt(16 * 4)
    assert (params["downsamples_0"]["blocks_0"]["block1"]["groupnorm"]["weight"] == 1).all()
    assert np.std(params["to_time_0_0"]["weights"]) > 0.4


def test_patches_hold_a_channel_s_samples_side_by_side():
    x = jnp.arange(12.0).reshape(1, 6, 2)
    patched = patch(x, 3)
    assert patched.shape == (1, 2, 6)
    assert patched[0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert (unpatch(patched, 3) == x).all()


def test_bfloat16_compute_is_near_float32_and_keeps_float32_parameters(tiny_backbone, bfloat16_units):
    coarse = make_backbone({"name": "unet1d", **TINY_SIZES}, "bfloat16")
    params = tiny_backbone.init(jax.random.key(0), False)
    x, label = inputs(tiny_backbone)
    exact, rough = tiny_backbone.separate(params, x, label)[0], coarse.separate(params, x, label)[0]
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(exact - rough).max() < 0.02 * np.abs(exact).max()
    grads = jax.grad(lambda p: coarse.separate(p, x, label)[0].sum())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_parameters_cast_once_answer_like_parameters_cast_at_every_call(tiny_backbone, bfloat16_units):
    coarse = make_backbone({"name": "unet1d", **TINY_SIZES}, "bfloat16")
    params = tiny_backbone.init(jax.random.key(0), False)
    stored = cast_params(params, "bfloat16")
    assert stored["bottleneck"]["pre_block"]["block1"]["project"]["weight"].dtype == jnp.bfloat16
    assert stored["bottleneck"]["pre_block"]["block1"]["groupnorm"]["weight"].dtype == jnp.float32
    x, label = inputs(tiny_backbone)
    expected, y = coarse.separate(params, x, label)[0], coarse.separate(stored, x, label)[0]
    np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


def test_a_device_without_bfloat16_units_computes_in_float32(tiny_backbone, monkeypatch):
    monkeypatch.setattr("msr_jax.models.backbone.has_bfloat16_units", lambda: False)
    params = tiny_backbone.init(jax.random.key(0), False)
    x, label = inputs(tiny_backbone)
    asked = make_backbone({"name": "unet1d", **TINY_SIZES}, "bfloat16")
    exact, y = tiny_backbone.separate(params, x, label)[0], asked.separate(cast_params(params, "bfloat16"), x, label)[0]
    np.testing.assert_array_equal(y, exact)


def test_recomputation_changes_neither_names_nor_gradients(tiny_backbone):
    remat = make_backbone({"name": "unet1d", **TINY_SIZES, "remat": (0,)})
    params = tiny_backbone.init(jax.random.key(0), False)
    assert jax.tree.structure(params) == jax.tree.structure(remat.init(jax.random.key(0), False))
    x, label = inputs(tiny_backbone)
    loss = lambda b: lambda p: jnp.square(b.separate(p, x, label)[0]).mean()
    assert "remat" in str(jax.make_jaxpr(jax.grad(loss(remat)))(params))
    for a, b in zip(*(jax.tree.leaves(jax.grad(loss(n))(params)) for n in (tiny_backbone, remat)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_accelerators_keep_less_for_the_gradient_and_compute_the_same(tiny_backbone, name):
    params = tiny_backbone.init(jax.random.key(0), False)
    x, label = inputs(tiny_backbone)

    def gradient(backbone):
        return jax.jit(jax.value_and_grad(lambda p: jnp.square(backbone.separate(p, x, label)[0]).sum()))(params)

    expected = gradient(tiny_backbone)
    with traced_for(name):
        found = gradient(make_backbone({"name": "unet1d", **TINY_SIZES}))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))


def test_a_zero_initialised_output_is_silence():
    backbone = make_backbone({"name": "unet1d", **TINY_SIZES, "zero_init_output": True})
    x, label = inputs(backbone)
    assert not np.any(backbone.separate(backbone.init(jax.random.key(0), False), x, label)[0])


def test_label_noise_level_and_features_all_reach_the_output(tiny_backbone):
    params = tiny_backbone.init(jax.random.key(0), True)
    x, label = inputs(tiny_backbone)
    tau = jnp.full((2,), -0.5)
    _, features = tiny_backbone.separate(tiny_backbone.init(jax.random.key(1), False), x, label)
    y = tiny_backbone.refine(params, x, label, tau, features)
    variants = [
        tiny_backbone.refine(params, x, label[::-1], tau, features),
        tiny_backbone.refine(params, x, label, tau + 0.3, features),
        tiny_backbone.refine(params, x, label, tau, None),
    ]
    for k in range(len(features)):
        # Not a constant: before the bottleneck's attention the norms take that out.
        changed = [jnp.roll(f, 1, axis=1) if i == k else f for i, f in enumerate(features)]
        variants.append(tiny_backbone.refine(params, x, label, tau, changed))
    assert all(np.abs(v - y).max() > 1e-6 * np.abs(y).max() for v in variants)


def test_a_level_that_there_is_not_cannot_be_computed_again():
    levels = len(TINY_SIZES["factors"])
    with pytest.raises(UserError, match=f"model.remat names level {levels}; there are 0 to {levels - 1}"):
        make_backbone({"name": "unet1d", **TINY_SIZES, "remat": (0, levels)})


def test_lengths_and_sizes_that_do_not_fit_are_refused(tiny_backbone):
    with pytest.raises(UserError, match="multiple of 16"):
        tiny_backbone.check_length(100)
    with pytest.raises(UserError, match="unknown fields: chanels"):
        make_backbone({"name": "unet1d", "chanels": 4})
    with pytest.raises(UserError, match="different numbers of levels"):
        make_backbone({"name": "unet1d", **TINY_SIZES, "factors": (2, 2)})
    with pytest.raises(UserError, match=r"resnet_groups .* must divide the channels"):
        make_backbone({"name": "unet1d", **TINY_SIZES, "resnet_groups": 3})
    for change, words in (
        ({"multipliers": (2, *TINY_SIZES["multipliers"][1:])}, "must begin with 1"),
        ({"factors": (3, *TINY_SIZES["factors"][1:]), "kernel_multiplier_downsample": 1}, "must be even"),
    ):
        with pytest.raises(UserError, match=words):
            make_backbone({"name": "unet1d", **TINY_SIZES, **change})
    with pytest.raises(UserError, match="no backbone 'unet2d'"):
        make_backbone({"name": "unet2d"})
