"""The method does not know which network it refines: a third family goes all the way, and all families agree on batching."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msr_jax
from msr_jax.config import unet_base
from msr_jax.configs import bsrf_det_small
from msr_jax.devices import traced_for
from msr_jax.methods.stages import make_objective, make_refiner
from msr_jax.models.backbone import BACKBONES, copy_shared, make_backbone
from msr_jax.train.loop import train
from msr_jax.weights.model_folder import flatten
from tests.conftest import TINY_SIZES
from tests.toy_backbone import make_toy

SEGMENT = 600
TINY_BSRF = {
    "dim": 12,
    "depth": 1,
    "freqs_per_bands": (1, 2, 4, 4, 22),
    "dim_head": 6,
    "heads": 2,
    "stft_n_fft": 64,
    "stft_hop_length": 16,
    "stft_win_length": 64,
    "stft_adapter_hidden": 3,
}


class Songs(grain.transforms.Map):
    """Four stems, of which the first is loudest, so that there is something to learn."""

    def map(self, k):
        rng = np.random.default_rng(int(k))
        stems = (
            rng.standard_normal((2, 4, SEGMENT, 2)).astype(np.float32) * np.array([0.3, 0.1, 0.05, 0.05])[:, None, None]
        )
        return {"stems": stems.astype(np.float32), "label": np.eye(4, dtype=np.float32)[[0, 1]]}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(BACKBONES, "toy", make_toy)
    config = unet_base()
    config.model = {"name": "toy", "stems": 4, "channels": 2}
    config.channels, config.segment, config.sample_rate = 2, SEGMENT, 8000
    config.data.update({"crop": SEGMENT, "batch": 2})
    config.consistency.num_levels = 4
    config.optim.lr = 0.02
    config.train.update(
        {"steps": 40, "steps_per_dispatch": 10, "log_every": 10, "validate_every": 40, "checkpoint_every": 40}
    )
    return config.to_dict()


def tiny_bsrf():
    config = bsrf_det_small.get_config()
    config.model.update(TINY_BSRF)
    config.segment = SEGMENT
    return config.to_dict()


def random_weights(backbone, seed=0):
    """Networks whose zeros are random too: at the start the adapters of a BS-RoFormer add nothing."""

    def network(k, timed):
        rng = np.random.default_rng([seed, k])  # not JAX's: that compiles a program for every shape
        draw = lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32)
        return jax.tree.map(draw, backbone.init(jax.random.key(k), timed))

    return {"deterministic": network(1, False), "diffusion": network(2, True), "consistency": network(3, True)}


def test_a_third_family_goes_from_the_separator_to_consistency_and_separates(toy, tmp_path):
    data = grain.MapDataset.range(1000).map(Songs())
    stages = (
        ("deterministic", {}),
        ("det_x2", {"deterministic": str(tmp_path / "deterministic")}),
        ("diffusion", {"deterministic": str(tmp_path / "deterministic")}),
        ("consistency", {"diffusion": str(tmp_path / "diffusion")}),
    )
    for method, init_from in stages:
        config = {**toy, "method": method, "init_from": {**toy["init_from"], **init_from}}
        train(config, tmp_path / method, data)
    mixture = np.random.default_rng(0).standard_normal((1500, 2)).astype(np.float32) * 0.3
    for method in ("det_x2", "diffusion", "consistency"):
        separator = msr_jax.load(tmp_path / method)
        assert separator.refine == method
        stems = separator.separate(mixture, 8000)
        assert {s.shape for s in stems.values()} == {mixture.shape}
        assert all(np.isfinite(s).all() for s in stems.values())
    first = msr_jax.load(tmp_path / "deterministic").separate(mixture, 8000)[toy["stems"][0]]
    assert np.abs(first - mixture).max() < np.abs(mixture).max()  # it has learned that the first stem is most of it


@pytest.mark.parametrize("refine", ["diffusion", "consistency"])
def test_stems_refined_in_one_batch_are_stems_refined_one_by_one(refine):
    config = tiny_bsrf()
    backbone = make_backbone(config["model"])
    weights = random_weights(backbone)
    mixture = 0.1 * jax.random.normal(jax.random.key(5), (2, SEGMENT, 2))
    run = lambda one_by_one: jax.jit(make_refiner(config, backbone, refine, 2, one_by_one))(
        weights, mixture, jax.random.key(6)
    )
    together, apart = run(False), run(True)
    assert together.shape == (2, 4, SEGMENT, 2)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 1e-4


def test_a_mixture_s_stems_do_not_depend_on_its_batch():
    config = tiny_bsrf()
    backbone = make_backbone(config["model"])
    weights = random_weights(backbone)
    mixture = 0.1 * jax.random.normal(jax.random.key(5), (2, SEGMENT, 2))
    keys = jax.random.split(jax.random.key(6), 2)
    run = jax.jit(make_refiner(config, backbone, "consistency"))
    both, second = run(weights, mixture, keys), run(weights, mixture[1:], keys[1:])
    np.testing.assert_allclose(both[1:], second, atol=1e-5)


# (The last two take a minute to compile; every stage of a family is trained in test_mel_band_roformer.py.)
@pytest.mark.parametrize(
    "method",
    ["deterministic", "det_x2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("diffusion", "consistency"))],
)
def test_every_objective_has_finite_gradients_for_all_that_trains(method):
    config = {**tiny_bsrf(), "method": method}
    config["consistency"]["num_levels"] = 3
    backbone = make_backbone({**config["model"], "attn_dropout": 0.1, "ff_dropout": 0.1})
    weights = random_weights(backbone)
    params = {
        "deterministic": weights["deterministic"],
        "det_x2": backbone.init(jax.random.key(4), False, True),
        "diffusion": weights["diffusion"],
        "consistency": weights["consistency"],
    }[method]
    frozen = {
        "deterministic": weights["deterministic"],
        "teacher": weights["diffusion"],
        "target": weights["consistency"],
    }
    batch = {"stems": 0.1 * jax.random.normal(jax.random.key(7), (2, 4, 2400, 2)), "label": jnp.eye(4)[:2]}
    loss = jax.jit(jax.value_and_grad(make_objective(config, backbone), has_aux=True))
    (value, _), grads = loss(params, frozen, batch, jax.random.key(8))
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["layers"]["time_0"]["attention"]["to_qkv"]).max() > 0
    assert not np.any(grads["layers"]["time_0"]["attention"]["freqs"])  # a table, not a parameter


@pytest.mark.slow
def test_distillation_has_the_same_loss_on_an_accelerator_where_features_are_made_twice():
    config = {**tiny_bsrf(), "method": "consistency", "stem_choice": "example"}
    config["consistency"]["num_levels"] = 3
    backbone = make_backbone(config["model"])
    weights = random_weights(backbone)
    frozen = {
        "deterministic": weights["deterministic"],
        "teacher": weights["diffusion"],
        "target": weights["consistency"],
    }
    batch = {"stems": 0.1 * jax.random.normal(jax.random.key(7), (2, 4, 2400, 2)), "label": jnp.eye(4)[1:3]}
    losses = []
    for name in ("cpu", "tpu"):
        with traced_for(name):
            loss = jax.jit(make_objective(config, backbone))
            losses.append(loss(weights["diffusion"], frozen, batch, jax.random.key(8))[0])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("name", ["bs_roformer", "unet1d"])
@pytest.mark.parametrize("method", ["deterministic", "det_x2"])
def test_the_loss_of_all_stems_is_the_mean_over_each_of_them(name, method, tiny_config):
    config = {**(tiny_bsrf() if name == "bs_roformer" else tiny_config), "method": method, "loss": "mse"}
    config["model"] = {**config["model"], "zero_init_output": False}
    backbone = make_backbone(config["model"])
    params = {
        m: backbone.init(jax.random.key(k), False, m == "det_x2") for k, m in enumerate(("deterministic", "det_x2"))
    }
    stems = 0.1 * jax.random.normal(jax.random.key(7), (2, 4, 2048, config["channels"]))

    def make_loss(choice):
        objective = jax.jit(make_objective({**config, "stem_choice": choice}, backbone))
        return lambda label: float(
            objective(params[method], params, {"stems": stems, "label": label}, jax.random.key(8))[0]
        )

    each = [*map(make_loss("example"), (jnp.tile(row, (2, 1)) for row in jnp.eye(4)))]
    np.testing.assert_allclose(make_loss("all")(jnp.eye(4)[:2]), np.mean(each), rtol=1e-5)
    assert (name == "bs_roformer" and method == "deterministic") or np.ptp(each) > 1e-6


def test_a_refiner_starts_from_what_it_shares_with_the_separator():
    backbone = make_backbone(tiny_bsrf()["model"])
    separator, fresh = backbone.init(jax.random.key(0), False), backbone.init(jax.random.key(1), True)
    started = copy_shared(fresh, separator)
    same = lambda a, b: (np.asarray(a) == np.asarray(b)).all()
    assert jax.tree.structure(started) == jax.tree.structure(fresh)
    assert jax.tree.all(jax.tree.map(same, started["mask_estimators"], separator["mask_estimators"]))
    attention = started["layers"]["freq_0"]["attention"]
    assert same(attention["to_out"], separator["layers"]["freq_0"]["attention"]["to_out"])
    assert same(attention["to_scale_shift"], fresh["layers"]["freq_0"]["attention"]["to_scale_shift"])


def test_a_refiner_can_meet_the_mixture_from_the_first_step_on():
    sizes = {**tiny_bsrf()["model"], "stft_adapter_hidden": 10}
    backbone, published = make_backbone({**sizes, "pass_mixture": 0.9}), make_backbone(sizes)
    _, features = backbone.separate(
        backbone.init(jax.random.key(0), False), 100 * jax.random.normal(jax.random.key(2), (1, 2400, 2))
    )
    spectrum = np.asarray(features["stft"])
    start = lambda b: np.asarray(b.condition(b.init(jax.random.key(1), True), features)["stft"])
    assert not np.any(start(published))
    far = np.abs(spectrum) > 100  # GELU leaves these as they are
    np.testing.assert_allclose(start(backbone)[far], 0.9 * spectrum[far], rtol=1e-4)


def test_a_refiner_scales_its_masks_and_a_separator_does_not():
    sizes = {**tiny_bsrf()["model"], "stft_adapter_hidden": 10, "pass_mixture": 0.9}
    full, tenth = make_backbone(sizes), make_backbone({**sizes, "mask_scale": 0.1})
    params = full.init(jax.random.key(0), True)
    x = jax.random.normal(jax.random.key(1), (1, 2400, 2))
    separator = full.init(jax.random.key(2), False)
    (_, features), (estimate, _) = full.separate(separator, x), tenth.separate(separator, x)
    np.testing.assert_array_equal(estimate, full.separate(separator, x)[0])
    refined = [b.refine(params, x, jnp.eye(4)[:1], jnp.zeros(1), b.condition(params, features)) for b in (full, tenth)]
    np.testing.assert_allclose(refined[1], 0.1 * refined[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "model",
    [
        {**tiny_bsrf()["model"], "attention_bias": True, "zero_init_output": True},
        {"name": "unet1d", **TINY_SIZES, "zero_init_output": True},
    ],
    ids=["bs_roformer", "unet1d"],
)
def test_what_starts_at_zero_anyway_is_warm_started_like_all_else(model):
    zeroed, plain = make_backbone(model), make_backbone({**model, "zero_init_output": False})
    separator = jax.tree.map(lambda x: x + 0.1, plain.init(jax.random.key(0), False))
    begun, other = (net.init(jax.random.key(1), True) for net in (zeroed, plain))
    started = flatten(copy_shared(begun, separator, plain=other))
    kept = [name for name, array in flatten(separator).items() if not np.array_equal(started[name], array)]
    zeros = lambda params: {name for name, array in flatten(params).items() if not np.any(array)}
    assert set(kept) == zeros(begun) - zeros(other) and kept
    assert not any(np.any(started[name]) for name in kept)


def test_masks_that_start_at_zero_do_so_after_a_warm_start_too():
    backbone = make_backbone({**tiny_bsrf()["model"], "zero_init_output": True})
    separator = make_backbone(tiny_bsrf()["model"]).init(jax.random.key(0), False)
    plain = make_backbone(tiny_bsrf()["model"]).init(jax.random.key(1), True)
    start = lambda keep: copy_shared(backbone.init(jax.random.key(1), True), separator, plain=plain if keep else None)
    x = jax.random.normal(jax.random.key(2), (1, 2400, 2))
    _, features = backbone.separate(separator, x)
    refine = lambda params: backbone.refine(
        params, x, jnp.eye(4)[:1], jnp.zeros(1), backbone.condition(params, features)
    )
    assert not np.any(refine(start(True))) and np.any(refine(start(False)))
    attention = [p["layers"]["time_0"]["attention"]["to_qkv"] for p in (start(True), separator)]
    np.testing.assert_array_equal(*attention)
