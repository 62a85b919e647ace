"""Noise levels: the Karras schedule, the log-normal training distribution and the mixture used in distillation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def karras_sigmas(num_levels: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Levels (num_levels,) falling from sigma_max to sigma_min, evenly spaced in σ^(1/ρ); one level is [sigma_max].

    EDM eq. 5; computed in float64, returned in float32.

    >>> karras_sigmas(3, 1.0, 9.0, 2.0).tolist()
    [9.0, 4.0, 1.0]
    """
    if num_levels == 1:
        return np.array([sigma_max], np.float32)
    ramp = np.linspace(0.0, 1.0, num_levels)
    return np.asarray(_karras(ramp, sigma_min, sigma_max, rho), np.float32)


def _karras(ramp: Any, sigma_min: float, sigma_max: float, rho: float) -> Any:
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def sampler_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Levels (num_steps + 1,) of the diffusion sampler: the Karras schedule and a final 0."""
    return np.append(karras_sigmas(num_steps, sigma_min, sigma_max, rho), np.float32(0))


def consistency_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """Levels (num_steps,) at which the consistency sampler calls its network.

    As released: the schedule is built with one level more than there are steps, and its last level is never used.

    >>> consistency_sigmas(2, 1.0, 9.0, 2.0).tolist()
    [9.0, 4.0]
    """
    return karras_sigmas(num_steps + 1, sigma_min, sigma_max, rho)[:num_steps]


def lognormal_sigma(normal: Array, p_mean: float, p_std: float) -> Array:
    """Training noise level exp(p_mean + p_std · normal), same shape as `normal`."""
    return jnp.exp(p_mean + p_std * normal)


def distillation_sigma(
    normal: Array,
    uniform: Array,
    p_mean: float,
    p_std: float,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    limit: float,
) -> Array:
    """Levels (batch,) of the denoising term of distillation: log-normal for the first floor(batch/2), Karras for the rest.

    Args:
      normal: (floor(batch/2),) standard normal draws.
      uniform: (batch - floor(batch/2),) draws in [0, 1); scaled by `limit` (0.7 as released), the place on the schedule.
    """
    return jnp.concatenate(
        [lognormal_sigma(normal, p_mean, p_std), _karras(limit * uniform, sigma_min, sigma_max, rho)]
    )
