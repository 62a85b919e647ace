"""The training state and the compiled training step: several optimiser steps per dispatch, as one `lax.scan`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from msr_jax.methods.stages import Objective

Array = jax.Array
Params = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. `target_params` is the running average that distillation compares with."""

    step: Array
    params: Params
    opt_state: Any
    ema_params: Params | None = None
    target_params: Params | None = None


def init_state(params: Params, tx: optax.GradientTransformation, ema_rate: float, has_target: bool) -> TrainState:
    """State before the first step; averages start as copies of the parameters (copies: the state is donated)."""
    copy = lambda: jax.tree.map(jnp.copy, params)  # noqa: E731
    ema, target = copy() if ema_rate else None, copy() if has_target else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema, target)


def make_train_steps(
    loss_fn: Objective,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    seed: int,
    ema_rate: float = 0.0,
    target_rate: float = 0.0,
) -> Callable[[TrainState, Mapping[str, Params], Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """Steps to be jitted by the caller (who knows the sharding), with the state donated.

    Returns:
      steps(state, frozen, batches) -> (state, metrics). Leaves of `batches` are (steps, accumulate, batch, …): gradients are
      averaged over the second axis. Metrics are (steps,): loss, grad_norm, lr and the objective's own.

    The key of micro-batch m of step s is fold_in(fold_in(key(seed), s), m): nothing random is carried. As released, the
    distillation target is averaged with the parameters that the gradient was taken at, before the optimiser's update.
    """

    def step(state: TrainState, frozen: Mapping[str, Params], batches: Mapping[str, Array]):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if state.target_params is not None:
            frozen = {**frozen, "target": state.target_params}
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        count = jax.tree.leaves(batches)[0].shape[0]

        def accumulate(total, item):
            index, batch = item
            result = grad_fn(state.params, frozen, batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, result), None

        if count == 1:
            batch = jax.tree.map(lambda x: x[0], batches)
            (loss, aux), grads = grad_fn(state.params, frozen, batch, jax.random.fold_in(key, 0))
        else:
            first = jax.tree.map(lambda x: x[0], batches)
            shapes = jax.eval_shape(grad_fn, state.params, frozen, first, key)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            total, _ = lax.scan(accumulate, zeros, (jnp.arange(count), batches))
            (loss, aux), grads = jax.tree.map(lambda x: x / count, total)
        target = state.target_params
        if target is not None:
            target = optax.incremental_update(state.params, target, 1 - target_rate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema_params
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_rate)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step), **aux}
        return TrainState(state.step + 1, params, opt_state, ema, target), metrics

    def steps(state: TrainState, frozen: Mapping[str, Params], batches: Mapping[str, Array]):
        return lax.scan(lambda state, batch: step(state, frozen, batch), state, batches)

    return steps
