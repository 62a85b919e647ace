"""Optimisers and learning-rate schedules of the config, by optax."""

from collections.abc import Mapping
from typing import Any

import optax

from msr_jax.errors import UserError


def make_schedule(optim: Mapping[str, Any], total_steps: int) -> optax.Schedule:
    """Learning rate by optimiser step: "constant" (as released) or "cosine" to 0, after a linear warm-up of `warmup_steps`.

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
    makers = {"adam": optax.adam, "radam": optax.radam}
    if optim["name"] not in makers:
        raise UserError(f"optim.name must be one of {', '.join(makers)}, not '{optim['name']}'")
    update = makers[optim["name"]](schedule, b1=optim["b1"], b2=optim["b2"], eps=optim["eps"])
    return optax.chain(optax.clip_by_global_norm(optim["clip_norm"]), update) if optim["clip_norm"] else update
