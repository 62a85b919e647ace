"""Samplers that refine an estimate; each is one `lax.scan`, knows no network and takes any σ values without recompiling.

Noise comes from a function `noise(index)` of a traced index, made from explicit keys (`noise_from_keys`) or from a
recorded sequence (`noise_from_sequence`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msr_jax.methods.denoiser import Denoiser, clip_waveform, over_axes_of

Array = jax.Array
Noise = Callable[[Array | int], Array]
Slope = Callable[[Array, Array], Array]
Solver = Callable[[Slope, Array, Array, Array], Array]


def euler(slope: Slope, x: Array, sigma: Array, sigma_next: Array) -> Array:
    """First order, as released: x (batch, …) at level `sigma` to `sigma_next`, scalars; one network call."""
    return x + (sigma_next - sigma) * slope(x, sigma)


def heun(slope: Slope, x: Array, sigma: Array, sigma_next: Array) -> Array:
    """Second order, as the paper's wording suggests: two network calls, one at the last level, which is 0."""
    g = slope(x, sigma)
    ahead = x + (sigma_next - sigma) * g
    correct = lambda ahead: x + (sigma_next - sigma) * (g + slope(ahead, sigma_next)) / 2
    return lax.cond(sigma_next > 0, correct, lambda ahead: ahead, ahead)


# By the name in the config's `diffusion.sampler.solver`.
SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}


def noise_from_keys(keys: Array, shape: tuple[int, ...]) -> Noise:
    """Standard normal noise of `shape` (batch, …), one key per example, so that an example's noise ignores its batch."""
    draw = lambda key, index: jax.random.normal(jax.random.fold_in(key, index), shape[1:])
    return lambda index: jax.vmap(draw, (0, None))(keys, index)


def noise_from_sequence(sequence: Array) -> Noise:
    """Recorded noise (count, batch, …), in the order that the sampler's docstring gives."""
    return lambda index: sequence[index]


def refine_by_diffusion(
    denoise: Denoiser,
    estimate: Array,
    sigmas: Array | np.ndarray,
    noise: Noise,
    *,
    num_resamples: int = 1,
    s_churn: float = 0.0,
    solver: str = "euler",
    clip: float = 1.0,
) -> Array:
    """The released stochastic sampler, started from the deterministic estimate (paper, section on diffusion refinement).

    Every transition σ_i → σ_{i+1} is run `num_resamples` times; between the runs the signal is noised back to σ_i.
    `solver` names one of `SOLVERS`.

    Args:
      estimate: (batch, …) deterministic estimate.
      sigmas: (T + 1,) falling levels, the last 0.
      noise: index 0 is the start; run k = i · num_resamples + r has 1 + 2k (churn) and 2 + 2k (noising back).
      s_churn: γ = min(s_churn/T, √2 - 1), in every transition.
      clip: the result is clamped to ±clip; 0 leaves it alone.

    Returns:
      The refined estimate (batch, …), float32.
    """
    num_steps = sigmas.shape[0] - 1
    gamma = min(s_churn / num_steps, 2**0.5 - 1)
    sigmas = jnp.asarray(sigmas, jnp.float32)
    batch = estimate.shape[0]

    def slope(x: Array, sigma: Array) -> Array:
        return (x - denoise(x, jnp.broadcast_to(sigma, (batch,)))) / sigma

    def run(x: Array, index: Array) -> tuple[Array, None]:
        step, resample = index // num_resamples, index % num_resamples
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        sigma_hat = (1 + gamma) * sigma
        x_hat = x + jnp.sqrt(sigma_hat**2 - sigma**2) * noise(1 + 2 * index)
        x = SOLVERS[solver](slope, x_hat, sigma_hat, sigma_next)
        back = jnp.where(resample < num_resamples - 1, jnp.sqrt(sigma**2 - sigma_next**2), 0.0)
        return (x if num_resamples == 1 else x + back * noise(2 + 2 * index)), None

    x = estimate + sigmas[0] * noise(0)
    x, _ = lax.scan(run, x, jnp.arange(num_steps * num_resamples))
    return clip_waveform(x, clip)


def refine_by_consistency(
    consistency: Denoiser,
    estimate: Array,
    sigmas: Array | np.ndarray,
    noise: Noise,
    *,
    sigma_min: float,
    renoise: str = "released",
    clip: float = 1.0,
) -> Array:
    """Multi-step consistency sampling started from the deterministic estimate (paper, section on consistency distillation).

    Args:
      estimate: (batch, …) deterministic estimate.
      sigmas: (T,) falling levels, one network call at each.
      noise: index 0 is the start, 1 + i the noise after call i.
      renoise: "standard" noises the signal again after every call but the last; "released" leaves out the one before
        the last call too, so that T = 1 and T = 2 inject no noise.
      clip: the result is clamped to ±clip; 0 leaves it alone.

    Returns:
      The refined estimate (batch, …), float32.
    """
    num_steps = sigmas.shape[0]
    sigmas = jnp.asarray(sigmas, jnp.float32)
    batch = estimate.shape[0]
    injections = num_steps - {"released": 2, "standard": 1}[renoise]
    renoise_sigma = jnp.sqrt(jnp.maximum(jnp.roll(sigmas, -1) ** 2 - sigma_min**2, 0.0))
    renoise_sigma = jnp.where(jnp.arange(num_steps) < injections, renoise_sigma, 0.0)

    def call(x: Array, index: Array) -> tuple[Array, None]:
        x = consistency(x, jnp.broadcast_to(sigmas[index], (batch,)))
        return (x if injections <= 0 else x + renoise_sigma[index] * noise(1 + index)), None

    x = estimate + sigmas[0] * noise(0)
    x, _ = lax.scan(call, x, jnp.arange(num_steps))
    return clip_waveform(x, clip)


def solve_by_heun(denoise: Denoiser, x: Array, grid: Array, level: Array, num_steps: Array) -> Array:
    """The teacher of distillation: `num_steps` Heun steps down the grid, from each example's own level.

    A scan whose body is skipped by `lax.cond` past `num_steps`: its cost follows the steps taken, not the grid.

    Args:
      x: (batch, …) at noise level grid[level].
      grid: (T,) falling levels, without 0.
      level: (batch,) integer start indices, level + num_steps ≤ T - 1.
      num_steps: traced scalar integer, shared by the batch.
    """
    grid = jnp.asarray(grid, jnp.float32)

    def heun_step(x: Array, k: Array) -> Array:
        here, there = grid[level + k], grid[level + k + 1]  # (batch,)
        slope = lambda x, sigma: (x - denoise(x, sigma)) / over_axes_of(sigma, x)
        g, down = slope(x, here), over_axes_of(there - here, x)
        return x + down * (g + slope(x + down * g, there)) / 2

    def step(x: Array, k: Array) -> tuple[Array, None]:
        return lax.cond(k < num_steps, heun_step, lambda x, k: x, x, k), None

    return lax.scan(step, x, jnp.arange(grid.shape[0] - 1))[0]
