"""Learning rates follow the config's schedule, and clipping bounds what the optimiser sees."""

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
