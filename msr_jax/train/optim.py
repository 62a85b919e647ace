"""Optimisers and learning-rate schedules of the config, by optax."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msr_jax.errors import UserError


def scale_by_radam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Rectified Adam as PyTorch computes it, with which the published models were trained.

    `optax.scale_by_radam` differs in two ways that show. It adds eps to the second moment after the correction of its
    bias, where PyTorch adds it before: for gradients of 1e-6 that changes updates by a fifth. And it takes 1 - b2^t
    by subtraction, whose rounding error the rectification magnifies.
    """
    longest = 2 / (1 - b2) - 1

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        left1, left2 = (-jnp.expm1(count * math.log(b)) if b else jnp.ones(()) for b in (b1, b2))  # 1 - b^t
        length = longest - 2 * count * (1 - left2) / left2
        is_rectified = length > 5
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        rectification = jnp.sqrt(jnp.where(is_rectified, square * left2, 1.0))

        def scale(m, v):
            return m / left1 * jnp.where(is_rectified, rectification / (jnp.sqrt(v) + eps), 1.0)

        return jax.tree.map(scale, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_schedule(optim: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Learning rate by optimiser step: "constant" (as released) or "cosine" to 0, after a linear warm-up.

    The warm-up rises from 0 over `warmup_steps`; the cosine ends at `total_steps`.

    Raises:
      UserError: unknown schedule.
    """
    warmup = optim["warmup_steps"]
    if optim["schedule"] == "constant":
        after = optax.constant_schedule(optim["lr"])
    elif optim["schedule"] == "cosine":
        after = optax.cosine_decay_schedule(optim["lr"], max(total_steps - warmup, 1))
    else:
        raise UserError(f"optim.schedule must be constant or cosine, not '{optim['schedule']}'")
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, optim["lr"], warmup), after], [warmup])


def make_optimizer(optim: Mapping[str, Any], schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam or RAdam without decay, after clipping to the global norm `clip_norm` (0: none, as released).

    Raises:
      UserError: unknown optimiser.
    """
    makers = {"adam": optax.scale_by_adam, "radam": scale_by_radam}
    if optim["name"] not in makers:
        raise UserError(f"optim.name must be one of {', '.join(makers)}, not '{optim['name']}'")
    parts = [
        makers[optim["name"]](b1=optim["b1"], b2=optim["b2"], eps=optim["eps"]),
        optax.scale_by_learning_rate(schedule),
    ]
    if optim["clip_norm"]:
        parts.insert(0, optax.clip_by_global_norm(optim["clip_norm"]))
    return optax.chain(*parts)
