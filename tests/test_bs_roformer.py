"""The BS-RoFormer: sizes, scale, silence, memory, precision, dropout and recomputation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msr_jax
from msr_jax.config import bsrf_base
from msr_jax.devices import traced_for
from msr_jax.errors import UserError
from msr_jax.models import adapters, mask_roformer, roformer
from msr_jax.models.backbone import cast_params, make_backbone
from msr_jax.models.roformer import attend, map_chunks
from msr_jax.weights.model_folder import save_model
from tests.test_backbones import TINY_BSRF, random_weights, tiny_bsrf

SIZES = {**bsrf_base().model.to_dict(), **TINY_BSRF, "attn_dropout": 0.0, "ff_dropout": 0.0}


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def backbone():
    return make_backbone(SIZES)


@pytest.fixture(scope="module")
def weights(backbone):
    return random_weights(backbone)


@pytest.fixture(scope="module")
def separate(backbone, weights):
    return jax.jit(lambda x: backbone.separate(weights["deterministic"], x)[0])


def mixture(samples=600):
    return 0.1 * jax.random.normal(jax.random.key(0), (2, samples, 2))


def test_the_official_networks_have_the_published_numbers_of_parameters():
    backbone = make_backbone(bsrf_base().model.to_dict())
    tables = 16 * 32  # published once per attention block, and not trained
    assert count(jax.eval_shape(lambda: backbone.init(jax.random.key(0), False))) == 131_704_100 + tables
    assert count(jax.eval_shape(lambda: backbone.init(jax.random.key(0), True))) == 179_865_512 + tables


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        backbone = make_backbone({**SIZES, "depth": depth})
        params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), False))
        return len(str(jax.make_jaxpr(lambda p, x: backbone.separate(p, x)[0])(params, mixture())).splitlines())

    assert size(2) == size(9)


def test_stems_scale_with_the_mixture_and_silence_gives_silence(separate):
    stems = separate(mixture())
    assert stems.shape == (2, 4, 600, 2)
    np.testing.assert_allclose(separate(1e-5 * mixture()) * 1e5, stems, atol=1e-6)
    assert not np.any(separate(jnp.zeros((2, 600, 2))))


def test_gradients_of_silence_are_finite(backbone, weights):
    x = mixture().at[0].set(0).at[1, :300].set(0)
    loss = lambda p: jnp.square(backbone.separate(p, x)[0] - 0.1).sum()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(weights["deterministic"])))


def test_memory_does_not_hold_the_logits_of_attention_over_time():
    backbone = make_backbone({**SIZES, "depth": 1})
    params = jax.eval_shape(lambda: backbone.init(jax.random.key(0), False))
    frames = 4001
    x = jax.ShapeDtypeStruct((1, (frames - 1) * 16, 2), jnp.float32)
    compiled = jax.jit(lambda p, x: backbone.separate(p, x)[0]).lower(params, x).compile()
    logits = 5 * 2 * frames**2 * 4  # bands, heads
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 3


@pytest.mark.parametrize("length", [5, 200])
def test_attention_is_the_softmax_average(length):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, length, 3, 8))
    weights = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(8), axis=-1)
    np.testing.assert_allclose(attend(q, k, v), jnp.einsum("bhqk,bkhe->bqhe", weights, v), atol=1e-5)
    np.testing.assert_allclose(jax.nn.dot_product_attention(q, k, v), attend(q, k, v), atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_wide_heads_go_one_by_one_on_a_cpu_and_give_what_narrow_ones_give_at_once(weights, monkeypatch, remat):
    def loss(params):
        return jnp.square(make_backbone({**SIZES, "remat": remat}).separate(params, mixture())[0]).sum()

    def loops():
        # A function of its own: JAX keeps what it traced of one.
        return str(jax.make_jaxpr(lambda params: loss(params))(weights["deterministic"])).count("scan[")

    at_once, few = jax.value_and_grad(loss)(weights["deterministic"]), loops()
    monkeypatch.setattr(mask_roformer, "NARROW", 0)
    assert loops() > few
    one_by_one = jax.value_and_grad(loss)(weights["deterministic"])
    for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(one).max()))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("length", [4, 20, 300])  # within reach, in one piece, in several
def test_attention_within_reach_is_the_softmax_average_of_near_tokens(length, platform):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, length, 3, 8))
    logits = jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(8)
    distance = np.abs(np.arange(length)[:, None] - np.arange(length))
    weights = jax.nn.softmax(jnp.where(distance <= 5, logits, -jnp.inf), axis=-1)
    with traced_for(platform):
        near = attend(q, k, v, reach=5)
    np.testing.assert_allclose(near, jnp.einsum("bhqk,bkhe->bqhe", weights, v), atol=1e-5)


def test_attention_on_a_long_segment_goes_no_farther_than_in_one_of_training(weights):
    trained, samples = 160, 4000  # frames of 16 samples: 10 either way, in each block
    within = make_backbone(SIZES, within=trained)
    of_training = [b.separate(weights["deterministic"], mixture(trained))[0] for b in (within, make_backbone(SIZES))]
    np.testing.assert_array_equal(*of_training)
    reach = 10 * SIZES["depth"] * SIZES["time_transformer_depth"] * 16 + 3 * SIZES["stft_n_fft"]
    assert reach < samples // 2
    x = mixture(samples)
    other = x.at[:, samples // 2 + reach :].set(0)
    for backbone, is_near in ((within, True), (make_backbone(SIZES), False)):
        run = jax.jit(lambda x, backbone=backbone: backbone.separate(weights["deterministic"], x)[0])
        apart = np.abs(run(x) - run(other))[:, :, : samples // 2].max()
        assert (apart < 1e-6) == is_near


@pytest.mark.parametrize(("segments", "is_heard"), [(8, False), (1, True)])
def test_chunks_of_several_segments_attend_no_farther_than_one(tmp_path, weights, segments, is_heard):
    chunk, part = 4096, 512
    save_model(tmp_path / "m", tiny_bsrf() | {"model": SIZES, "segment": chunk // segments}, weights)
    separator = msr_jax.load(tmp_path / "m", "none", segments=segments)
    x = 0.1 * np.random.default_rng(0).standard_normal((1, chunk, 2)).astype(np.float32)
    other = x.copy()
    other[:, 6 * part :] = 0
    beginning = lambda x: separator._run_chunks(x, 0)[..., :part, :]
    assert (np.abs(beginning(x) - beginning(other)).max() > 1e-6) == is_heard


def test_chunks_of_any_size_give_the_whole():
    x = jnp.arange(28.0).reshape(2, 7, 2)
    for size in (1, 2, 3, 5, 7, 20):
        np.testing.assert_array_equal(map_chunks(lambda part, key: 2 * part, x, size, None), 2 * x)


def test_a_fresh_adapter_adds_nothing(backbone, weights):
    fresh = backbone.init(jax.random.key(9), True)
    features = backbone.separate(weights["deterministic"], mixture())[1]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(backbone.condition(fresh, features)))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(backbone.condition(weights["diffusion"], features)))


def test_stem_noise_level_and_conditioning_all_reach_the_refiner_s_output(backbone, weights):
    params, x, tau = weights["diffusion"], mixture(), jnp.full((2,), -0.5)
    label = jnp.eye(4)[:1]
    conditioning = backbone.condition(params, backbone.separate(weights["deterministic"], x)[1])
    run = jax.jit(backbone.refine)
    y = run(params, x, label, tau, conditioning)
    variants = [run(params, x, jnp.eye(4)[1:2], tau, conditioning), run(params, x, label, tau + 0.3, conditioning)]
    for name in conditioning:
        variants.append(run(params, x, label, tau, {**conditioning, name: 2 * conditioning[name]}))
    assert all(np.abs(v - y).max() > 1e-5 * np.abs(y).max() for v in variants)


def test_dropout_needs_a_key_and_recomputation_changes_no_gradient(weights):
    dropping = make_backbone({**SIZES, "attn_dropout": 0.2, "ff_dropout": 0.2, "remat": False})
    remat = make_backbone({**SIZES, "attn_dropout": 0.2, "ff_dropout": 0.2, "remat": True})
    plain, params, x = make_backbone(SIZES), weights["deterministic"], mixture()
    without = dropping.separate(params, x)[0]
    np.testing.assert_array_equal(without, plain.separate(params, x)[0])
    key = jax.random.key(3)
    assert np.abs(dropping.separate(params, x, None, key)[0] - without).max() > 1e-3 * np.abs(without).max()
    loss = lambda b: jax.jit(jax.grad(lambda p: jnp.square(b.separate(p, x, None, key)[0]).sum()))
    for a, b in zip(*(jax.tree.leaves(loss(b)(params)) for b in (dropping, remat)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()))


def test_dropout_and_results_do_not_depend_on_how_many_sequences_go_together(weights, monkeypatch):
    dropping = {**SIZES, "attn_dropout": 0.2, "ff_dropout": 0.2}
    run = lambda: make_backbone(dropping).separate(weights["deterministic"], mixture(), None, jax.random.key(3))[0]
    together = run()
    monkeypatch.setitem(roformer.CHUNK_TOKENS, "cpu", 1)
    np.testing.assert_allclose(run(), together, atol=1e-5 * np.abs(together).max())


def test_adapters_that_run_with_their_layer_give_the_same_output_and_gradients(weights):
    backbone = make_backbone({**SIZES, "remat": True})
    features = backbone.separate(weights["deterministic"], mixture())[1]
    label, tau = jnp.eye(4)[:1], jnp.full((2,), -0.5)

    def gradient(condition):
        loss = lambda p: jnp.square(backbone.refine(p, mixture(), label, tau, condition(p, features))).sum()
        return jax.jit(jax.value_and_grad(loss))(weights["diffusion"])

    for a, b in zip(*(jax.tree.leaves(gradient(c)) for c in (backbone.condition, backbone.defer)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1e-3, np.abs(a).max()))


def test_the_spectrum_s_adapter_gives_the_same_over_some_frames_at_a_time(backbone, weights, monkeypatch):
    spectrum = jax.random.normal(jax.random.key(1), (2, 23, 33, 2, 2))
    run = lambda: adapters._adapt_stft(weights["diffusion"]["adapters"]["stft"], spectrum, jnp.float32, True)
    whole = run()
    monkeypatch.setattr(adapters, "FRAMES", 5)
    np.testing.assert_allclose(run(), whole, atol=1e-5)


def test_accelerators_compute_the_same_in_their_own_form(weights, separate):
    with traced_for("tpu"):
        stems = make_backbone({**SIZES, "remat": True}).separate(weights["deterministic"], mixture())[0]
    np.testing.assert_allclose(stems, separate(mixture()), atol=1e-5)


def test_bfloat16_is_close_to_float32(weights, separate, bfloat16_units):
    exact = separate(mixture())
    coarse = make_backbone(SIZES, "bfloat16")
    params = cast_params(weights["deterministic"], "bfloat16")
    rough = jax.jit(lambda p, x: coarse.separate(p, x)[0])(params, mixture())
    assert rough.dtype == jnp.float32
    assert 0 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.015


def test_sizes_and_lengths_that_do_not_fit_are_refused(backbone):
    for change, words in (
        ({"freqs_per_bands": (1, 2)}, "add up to 3 bins, and stft_n_fft gives 33"),
        ({"stft_hop_length": 100}, "must hold"),
        ({"time_transformer_depth": 0}, "must be at least 1"),
        ({"dept": 3}, "unknown fields: dept"),
    ):
        with pytest.raises(UserError, match=words):
            make_backbone({**SIZES, **change})
    with pytest.raises(UserError, match="too short"):
        backbone.check_length(32)
