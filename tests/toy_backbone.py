"""A third network family, in one module: a gain per stem and channel, and a refiner that learns a correction of it."""

import jax
import jax.numpy as jnp

from msr_jax.models.interface import Backbone


def make_toy(sizes, dtype):
    stems, channels = sizes["stems"], sizes["channels"]

    def init(key, timed, conditioned=None):
        gain = 0.1 * jax.random.normal(key, (stems, channels))
        timed_part = {"level": jnp.zeros(())} if timed else {}
        is_conditioned = timed if conditioned is None else conditioned
        return {"gain": gain, **timed_part, **({"adapter": jnp.zeros(())} if is_conditioned else {})}

    def separate(params, mixture, label, key=None):
        estimate = params["gain"][:, None] * mixture[:, None]
        return estimate, mixture

    def condition(params, features):
        return params["adapter"] * features

    def refine(params, x, label, tau, conditioning, key=None):
        gain = jnp.tile(label @ params["gain"], (len(x) // len(label), 1))[:, None]
        level = 0.0 if tau is None else params["level"] * tau[:, None, None]
        return (gain + level) * x + jnp.repeat(conditioning, len(x) // len(conditioning), 0)

    return Backbone(init, separate, condition, refine, stems_together=True)
