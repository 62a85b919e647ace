"""The training state and the compiled training step: several optimiser steps per dispatch, in one `lax.scan`."""

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
    """Everything that a step changes.

    `ema_params` is a running average of the parameters after each step, for use instead of them; `target_params` the
    one that distillation compares with.
    """

    step: Array
    params: Params
    opt_state: Any
    ema_params: Params | None = None
    target_params: Params | None = None


def init_state(params: Params, tx: optax.GradientTransformation, ema_rate: float, has_target: bool) -> TrainState:
    """State before the first step. Averages start as copies: the state is donated, so no buffer may be in it twice."""

    def copy():
        return jax.tree.map(jnp.copy, params)

    ema, target = copy() if ema_rate else None, copy() if has_target else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema, target)


def _updates(opt_state: Any) -> Array | int:
    """How many updates an optimiser has made, which is what its schedule goes by: steps that were skipped are none."""
    is_count = lambda _, value: getattr(value, "shape", None) == () and jnp.issubdtype(value.dtype, jnp.integer)
    return next((count for _, count in optax.tree.get_all_with_path(opt_state, "count", filtering=is_count)), 0)


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
      steps(state, frozen, batches) -> (state, metrics). Leaves of `batches` are (steps, micro-batches, batch, …); the
      gradients of a step's micro-batches are averaged. Metrics are (steps,): loss, grad_norm (before clipping), lr,
      skipped and the objective's own. A step whose loss or gradient is not finite is skipped: it counts, and changes
      nothing.

    The key of micro-batch m of step s is fold_in(fold_in(key(seed), s), m): nothing random is carried. The target of
    distillation moves once a step towards the parameters from before the optimiser's update, and after the forward
    pass of the first micro-batch: where the released program zeroes its gradients.
    """

    def step(
        state: TrainState, frozen: Mapping[str, Params], batches: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        count = jax.tree.leaves(batches)[0].shape[0]

        def moved(rate: float | Array) -> Params:
            return optax.incremental_update(state.params, state.target_params, rate)

        def micro_step(index: Array | int, batch: Mapping[str, Array]) -> Any:
            """One micro-batch: ((loss, metrics), gradients)."""
            inputs = frozen
            if state.target_params is not None:
                # Worked out where it is used, so that no second target is carried from one micro-batch to the next.
                later = jnp.where(index == 0, 0.0, 1 - target_rate)
                inputs = {**frozen, "target": state.target_params if count == 1 else moved(later)}
            return grad_fn(state.params, inputs, batch, jax.random.fold_in(key, index))

        def accumulate(total, item):
            return jax.tree.map(jnp.add, total, micro_step(*item)), None

        first = jax.tree.map(lambda x: x[0], batches)
        if count == 1:
            (loss, aux), grads = micro_step(0, first)
        else:
            shapes = jax.eval_shape(micro_step, 0, first)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            total, _ = lax.scan(accumulate, zeros, (jnp.arange(count), batches))
            (loss, aux), grads = jax.tree.map(lambda x: x / count, total)
        target = None if state.target_params is None else moved(1 - target_rate)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        # By 1, which waits for all gradients: a TPU's compiler would otherwise make Adam's float32 products where it reads the
        # 16-bit gradients for their norm, and hold both until the update.
        scale = jnp.where(is_finite, 1.0, 0.0)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema_params
        if ema is not None:
            # Young averages look back on less than their age: the initial parameters would be a third of one of 0.999 for
            # the first thousand steps.
            rate = jnp.minimum(ema_rate, (1.0 + state.step) / (10.0 + state.step))
            ema = optax.incremental_update(params, ema, 1 - rate)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": schedule(_updates(state.opt_state)),
            "skipped": ~is_finite,
            **aux,
        }
        after = TrainState(state.step + 1, params, opt_state, ema, target)
        # One selection fused into the update, not a branch: a branch would keep both states in memory.
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state)
        return kept.replace(step=after.step), metrics

    def steps(
        state: TrainState, frozen: Mapping[str, Params], batches: Mapping[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        return lax.scan(lambda state, batch: step(state, frozen, batch), state, batches)

    return steps
