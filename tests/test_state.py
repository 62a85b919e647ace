"""Averages of the parameters: the distillation target moves as in the released program, a young average forgets its start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msr_jax.train.state import init_state, make_train_steps


def test_the_target_moves_after_the_first_micro_batch_of_a_step():
    def loss_fn(params, frozen, batch, key):
        return jnp.sum(params["w"] * batch["x"]), {"target": frozen["target"]["w"].sum()}

    steps = jax.jit(make_train_steps(loss_fn, optax.sgd(1.0), lambda step: 1.0, seed=0, target_rate=0.5))
    state = init_state({"w": jnp.zeros(1)}, optax.sgd(1.0), 0.0, has_target=True)
    state = state.replace(params={"w": jnp.full(1, 8.0)})
    state, metrics = steps(state, {}, {"x": np.ones((2, 4, 1), np.float32)})
    # Step 1 sees 0, then (0 + 8)/2 three times; the update takes w to 7. Step 2 sees 4, then (4 + 7)/2 three times.
    np.testing.assert_allclose(metrics["target"], [(0 + 3 * 4) / 4, (4 + 3 * 5.5) / 4])
    np.testing.assert_allclose(state.target_params["w"], 5.5)
    np.testing.assert_allclose(state.params["w"], 6.0)


def test_a_young_average_looks_back_on_less_than_its_age():
    loss_fn = lambda params, frozen, batch, key: (jnp.sum(params["w"] * batch["x"]), {})
    steps = jax.jit(make_train_steps(loss_fn, optax.sgd(1.0), lambda step: 1.0, seed=0, ema_rate=0.5))
    state = init_state({"w": jnp.zeros(1)}, optax.sgd(1.0), 0.5, has_target=False)
    state, _ = steps(state, {}, {"x": -np.ones((20, 1, 1), np.float32)})  # w is 1, 2, 3, … 20
    average = 0.0
    for step in range(20):
        rate = min(0.5, (1 + step) / (10 + step))  # 0.1, 0.18, … and 0.5 from step 8 on
        average = rate * average + (1 - rate) * (step + 1)
    np.testing.assert_allclose(state.ema_params["w"], average, rtol=1e-6)
