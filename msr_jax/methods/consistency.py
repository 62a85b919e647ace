"""Consistency distillation: a student that maps any noise level to the teacher's end point (paper eq. 5 and 6)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msr_jax.methods.denoiser import Network, make_consistency, make_denoiser, over_axes_of
from msr_jax.methods.losses import Distance, mse
from msr_jax.methods.samplers import solve_by_heun

Array = jax.Array


def step_probabilities(num_levels: int) -> Array:
    """Probabilities (num_levels - 1,) of h = 1 … num_levels - 1 teacher steps, proportional to h as released."""
    h = jnp.arange(1, num_levels)
    return h / h.sum()


def draw_levels(key: Array, batch: int, num_levels: int, rule: str = "released") -> tuple[Array, Array]:
    """Start level n (batch,) and number of teacher steps h (scalar, shared by the batch), n + h ≤ num_levels - 1.

    "released" draws h first, with probability proportional to h, then n per example among those with room. "paper" draws
    the start (shared by the batch, so that the teacher's cost follows h) and then h uniformly among 1 … steps left.
    """
    key_h, key_n = jax.random.split(key)
    if rule == "paper":
        steps_left = jax.random.randint(key_n, (), 1, num_levels)
        h = jax.random.randint(key_h, (), 1, steps_left + 1)
        return jnp.full((batch,), num_levels - 1 - steps_left), h
    h = 1 + jax.random.choice(key_h, num_levels - 1, p=step_probabilities(num_levels))
    return jax.random.randint(key_n, (batch,), 0, num_levels - h), h


def teach(
    teacher: Network,
    start: Array,
    noise: Array,
    level: Array,
    num_steps: Array,
    grid: Array | np.ndarray,
    *,
    sigma_data: float,
) -> tuple[Array, Array]:
    """x_n = start + σ_n · noise, and the teacher's end point h steps further down, by its unclamped EDM denoiser; no gradient.

    Args:
      start, noise: (batch, time, channels).
      level: (batch,) start indices n into `grid`; num_steps: scalar h.
      grid: (T,) falling levels, the last σ_min.
    """
    grid = jnp.asarray(grid, jnp.float32)
    noised = start + over_axes_of(grid[level], start) * noise
    solved = solve_by_heun(make_denoiser(teacher, sigma_data), noised, grid, level, num_steps)
    return noised, lax.stop_gradient(solved)


def distillation_loss(
    student: Network,
    target: Network,
    noised: Array,
    solved: Array,
    level: Array,
    num_steps: Array,
    grid: Array | np.ndarray,
    *,
    sigma_data: float,
    sigma_min: float,
    distance: Distance = mse,
) -> tuple[Array, dict[str, Array]]:
    """Distance of f_student(x_n, σ_n) to f_target at the teacher's end point; weight 1 throughout.

    No gradient goes through the target, which is through before the student begins: nothing of it has to lie beside what is
    kept for the student's gradient.

    Args:
      noised, solved: of `teach`, with the level, num_steps and grid that it was given.

    Returns:
      The scalar loss, and {"estimate", "target_out": (batch, time, channels), "distance": (batch,)}.
    """
    grid = jnp.asarray(grid, jnp.float32)
    target_out = lax.stop_gradient(make_consistency(target, sigma_data, sigma_min)(solved, grid[level + num_steps]))
    noised, target_out = lax.optimization_barrier((noised, target_out))
    estimate = make_consistency(student, sigma_data, sigma_min)(noised, grid[level])
    per_item = distance(estimate, target_out)
    return per_item.mean(), {"estimate": estimate, "target_out": target_out, "distance": per_item}
