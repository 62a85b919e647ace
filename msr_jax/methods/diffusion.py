"""Diffusion training: denoise a noised stem, given the features of the frozen deterministic network (paper eq. 2 and 3)."""

import jax
import jax.numpy as jnp

from msr_jax.methods.denoiser import Network, edm_weight, make_denoiser, over_axes_of
from msr_jax.methods.losses import Distance, mse

Array = jax.Array


def mix_estimate(clean: Array, estimate: Array, choose_estimate: Array) -> Array:
    """x̃: the deterministic estimate where `choose_estimate` (batch,) is 1, the clean stem where it is 0.

    As released and as the paper's text ("p = 0: always clean"); the paper's eq. 2 has the two the other way round.
    """
    k = over_axes_of(choose_estimate, clean)
    return k * estimate + (1 - k) * clean


def denoising_loss(
    network: Network,
    clean: Array,
    start: Array,
    sigma: Array,
    noise: Array,
    *,
    sigma_data: float,
    clip: float = 0.0,
    weighted: bool = True,
    distance: Distance = mse,
) -> tuple[Array, dict[str, Array]]:
    """Weighted distance of D(start + σ·noise, σ) to the clean stem.

    Args:
      clean, start, noise: (batch, time, channels); `start` is x̃.
      sigma: (batch,).
      clip: clamp of the denoiser (1 as released in diffusion training, 0 inside distillation).
      weighted: the EDM weight per example (released), or 1 (paper eq. 3 as written).

    Returns:
      The scalar loss, and {"denoised": (batch, time, channels), "distance": (batch,), "weight": (batch,)}.
    """
    denoise = make_denoiser(network, sigma_data, clip)
    denoised = denoise(start + over_axes_of(sigma, start) * noise, sigma)
    per_item = distance(denoised, clean)
    weight = edm_weight(sigma, sigma_data) if weighted else jnp.ones_like(sigma)
    return (weight * per_item).mean(), {"denoised": denoised, "distance": per_item, "weight": weight}
