"""Learning rates follow the config's schedule, and clipping bounds what the optimiser sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msr_jax.config import unet_base
from msr_jax.errors import UserError
from msr_jax.train.optim import make_optimizer, make_schedule


def optim(**changes):
    return {**unet_base().optim.to_dict(), "lr": 1.0, **changes}


def test_the_constant_schedule_is_constant_and_the_warm_up_rises_from_zero():
    assert [float(make_schedule(optim(), 10)(step)) for step in (0, 5, 20)] == [1, 1, 1]
    warmed = make_schedule(optim(warmup_steps=4), 10)
    np.testing.assert_allclose([float(warmed(step)) for step in range(6)], [0, 0.25, 0.5, 0.75, 1, 1])


def test_the_cosine_ends_at_zero_on_the_last_step():
    schedule = make_schedule(optim(schedule="cosine", warmup_steps=2), 10)
    np.testing.assert_allclose([float(schedule(step)) for step in (2, 6, 10, 12)], [1, 0.5, 0, 0], atol=1e-7)


def test_a_decay_of_the_last_steps_leaves_those_before_constant():
    schedule = make_schedule(optim(schedule="linear", warmup_steps=2, decay_steps=4), 10)
    np.testing.assert_allclose([float(schedule(step)) for step in (1, 2, 6, 8, 10, 12)], [0.5, 1, 1, 0.5, 0, 0])
    whole = make_schedule(optim(schedule="linear", warmup_steps=2, decay_steps=20), 10)
    np.testing.assert_allclose([float(whole(step)) for step in (2, 6, 10)], [1, 0.5, 0])


def test_clipping_bounds_the_global_norm():
    config = optim(clip_norm=1.0, b1=0.0, b2=0.0, eps=1e6)  # such an Adam divides by eps alone: the gradient shows
    tx = make_optimizer(config, make_schedule(config, 10))
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    for grads, factor in (
        ({"a": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}, 0.2),
        ({"a": jnp.array([0.3, 0.0]), "b": jnp.array([0.4])}, 1.0),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["a"] * -1e6, grads["a"] * factor, rtol=1e-4)
        np.testing.assert_allclose(updates["b"] * -1e6, grads["b"] * factor, rtol=1e-4)


def test_unknown_names_are_answered():
    with pytest.raises(UserError, match=r"optim\.name must be one of adam, radam, adamw, prodigy, muon, not 'sgd'"):
        make_optimizer(optim(name="sgd"), lambda step: 1.0)
    with pytest.raises(UserError, match=r"weight_decay is 0\.1, but adam has none"):
        make_optimizer(optim(weight_decay=0.1), lambda step: 1.0)
    with pytest.raises(UserError, match=r"optim\.schedule"):
        make_schedule(optim(schedule="step"), 10)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-7])
def test_radam_is_pytorch_s_however_small_the_gradients(scale):
    config = optim(name="radam", b2=0.999)
    tx = make_optimizer(config, lambda step: 1.0)
    grads = scale * np.random.default_rng(0).standard_normal((12, 5))
    state, m, v, longest = tx.init(jnp.zeros(5)), 0.0, 0.0, 2 / (1 - 0.999) - 1
    for t, grad in enumerate(grads, 1):
        update, state = tx.update(jnp.asarray(grad, jnp.float32), state)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        expected, left, length = m / (1 - 0.9**t), 1 - 0.999**t, longest - 2 * t * 0.999**t / (1 - 0.999**t)
        if length > 5:
            factor = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            expected = expected * np.sqrt(factor * left) / (np.sqrt(v) + 1e-8)  # eps before the bias is taken out
        np.testing.assert_allclose(update, -expected, rtol=1e-3)


def test_the_linear_schedule_ends_at_its_final_rate():
    schedule = make_schedule(optim(schedule="linear", warmup_steps=2, final_lr=0.2), 10)
    np.testing.assert_allclose(
        [float(schedule(step)) for step in (1, 2, 6, 10, 20)], [0.5, 1, 0.6, 0.2, 0.2], rtol=1e-6
    )
    cosine = make_schedule(optim(schedule="cosine", final_lr=0.2), 10)
    np.testing.assert_allclose([float(cosine(step)) for step in (0, 5, 10)], [1, 0.6, 0.2], rtol=1e-6)


def test_adamw_decays_parameters_apart_from_the_gradient():
    config = optim(name="adamw", weight_decay=0.1)
    tx = make_optimizer(config, lambda step: 0.5)
    params = {"w": jnp.array([2.0, -4.0])}
    updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.5 * 0.1 * 2.0, 0.5 * 0.1 * 4.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "prodigy", "muon"])
@pytest.mark.parametrize("mask", [None, {"layers": {"freqs": True, "to_out": True}, "bias": False}])
def test_decay_leaves_tables_of_frequencies_as_they_are_to_the_bit(name, mask):
    """And their places in the optimiser's state, so that older checkpoints still fit."""
    tx = make_optimizer(
        optim(name=name, weight_decay=0.1), lambda step: 1e6 if name == "prodigy" else 1e-2, mask
    )  # prodigy: times 1e-6
    params = first = {"layers": {"freqs": jnp.ones((2, 4)), "to_out": jnp.ones((2, 4, 4))}, "bias": jnp.ones(3)}
    state = tx.init(params)
    assert sum(leaf.shape == (2, 4) for leaf in jax.tree.leaves(state)) >= 2
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, params)
        grads["layers"]["freqs"] = jnp.zeros((2, 4))  # `stop_gradient`
        updates, after = tx.update(grads, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        params, state = jax.tree.map(jnp.add, params, updates), after
    np.testing.assert_array_equal(params["layers"]["freqs"], first["layers"]["freqs"])
    assert (np.asarray(params["layers"]["to_out"]) < 1).all()


def test_prodigy_finds_its_rate_as_the_published_algorithm_without_bias_correction():
    """Against the algorithm written out (Prodigy, algorithm 4, with d0 = 1e-6), on a quadratic."""
    config = optim(name="prodigy", b2=0.999, weight_decay=0.01)
    tx = make_optimizer(config, lambda step: 1.0)
    aim, steep, x0 = np.array([3.0, -2.0, 0.5]), np.array([1.0, 2.0, 3.0]), np.zeros(3)  # from 0: no rounding of x0 - x
    params, x = jnp.asarray(x0, jnp.float32), x0.copy()
    state, d, d0, r, m, v, s = tx.init(params), 1e-6, 1e-6, 0.0, np.zeros(3), np.zeros(3), np.zeros(3)
    for _ in range(60):
        updates, state = tx.update((params - aim) * steep, state, params)
        params = params + updates
        g, b3, step = (x - aim) * steep, 0.999**0.5, d
        r = b3 * r + d / d0 * step * (g @ (x0 - x))
        m, v, s = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * (d * g) ** 2, b3 * s + d / d0 * step * g
        d = max(d, r / np.abs(s).sum())
        x = x - 0.01 * step * x - step * m / (np.sqrt(v) + d * 1e-8)
    assert d > 1e-3 and np.abs(x).max() > 0.1  # it did leave its first guess
    np.testing.assert_allclose(params, x, rtol=2e-3)


def test_prodigy_begins_after_steps_that_go_nowhere():
    """The first of a warm-up has a rate of 0, and a batch may have no gradient: nothing to divide by."""
    tx = make_optimizer(optim(name="prodigy"), lambda step: jnp.minimum(step / 2, 1.0))
    params = {"w": jnp.array([1.0, -2.0])}
    state, moved = tx.init(params), []
    for grads in ([1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]):
        updates, state = tx.update({"w": jnp.array(grads)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        moved.append(np.abs(updates["w"]).max())
    assert np.isfinite(moved).all() and moved[0] == 0 and moved[-1] > 0


def test_muon_makes_the_update_of_a_kernel_orthogonal_and_leaves_vectors_to_adamw():
    config = optim(name="muon", b1=0.9)
    tx = make_optimizer(config, lambda step: 1.0)
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.zeros((3, 8, 6)), "bias": jnp.zeros(4)}
    grads = {"kernel": jnp.asarray(rng.standard_normal((3, 8, 6)), jnp.float32), "bias": jnp.array([1e-3, -5, 2, -1e2])}
    updates, _ = tx.update(grads, tx.init(params), params)
    singular = np.linalg.svd(np.asarray(updates["kernel"]).reshape(24, 6), compute_uv=False)
    assert singular.max() / singular.min() < 2  # those of the gradient differ more
    root_mean_square = float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2)))
    assert 0.1 < root_mean_square < 0.4  # the size that AdamW's updates have
    np.testing.assert_allclose(np.sign(updates["bias"]), [-1, 1, -1, 1])


def test_muon_moves_each_of_stacked_matrices_on_its_own_and_no_stack_of_vectors():
    tx = make_optimizer(optim(name="muon", b1=0.9), lambda step: 1.0)
    rng = np.random.default_rng(0)
    layers = {
        "to_out": rng.standard_normal((3, 8, 6)),
        "to_out_bias": [[1e-3, -5.0], [2.0, -1e2]],
        "norm": [[1e-3, -5.0]],
    }
    grads = {"layers": {name: jnp.asarray(g, jnp.float32) for name, g in layers.items()}}
    params = jax.tree.map(jnp.zeros_like, grads)
    updates = tx.update(grads, tx.init(params), params)[0]["layers"]
    alone = {"to_out": grads["layers"]["to_out"][1]}
    expected = tx.update(alone, tx.init(alone), jax.tree.map(jnp.zeros_like, alone))[0]["to_out"]
    np.testing.assert_allclose(updates["to_out"][1], expected, atol=1e-5)
    for name in ("to_out_bias", "norm"):  # AdamW's first step: the sign, however large the gradient
        step = np.asarray(updates[name]) * -np.sign(layers[name])
        np.testing.assert_allclose(step, step[0, 0], rtol=1e-4)
        assert step[0, 0] > 0.5


@pytest.mark.parametrize("name", ["adam", "radam", "adamw", "prodigy", "muon"])
def test_every_optimiser_lowers_a_loss(name):
    import optax

    target = jnp.asarray(np.random.default_rng(1).standard_normal((6, 4)), jnp.float32)
    loss = lambda p: jnp.square(p["w"] - target).mean() + jnp.square(p["b"] - 1).mean()
    tx = make_optimizer(optim(name=name), lambda step: 1.0 if name == "prodigy" else 0.05)
    params = {"w": jnp.zeros((6, 4)), "b": jnp.zeros(4)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=120)
    assert float(loss(after)) < 0.5 * float(loss(params))
