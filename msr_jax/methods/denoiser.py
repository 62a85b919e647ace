"""Preconditioning: from a raw network F(x, τ) to the denoiser D(x, σ) and the consistency function f(x, σ).

σ is one value per example, (batch,). All arithmetic is float32 whatever the network computes in.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
# (scaled x (batch, …), tau (batch,), or None for the control without noise) -> F, of x's shape
Network = Callable[[Array, Array | None], Array]
Denoiser = Callable[[Array, Array], Array]  # (x (batch, …), sigma (batch,)) -> estimate of the clean x


class Scalings(NamedTuple):
    """Per-example coefficients (batch,): skip · x + out · F(in · x, tau)."""

    skip: Array
    out: Array
    into: Array
    tau: Array


def over_axes_of(value: Array, like: Array) -> Array:
    """Reshape (batch,) so that it broadcasts over `like` (batch, …)."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def edm_scalings(sigma: Array, sigma_data: float) -> Scalings:
    """EDM preconditioning (EDM table 1; paper, section on diffusion refinement)."""
    total = sigma**2 + sigma_data**2
    root = jnp.sqrt(total)
    return Scalings(sigma_data**2 / total, sigma * sigma_data / root, 1 / root, jnp.log(sigma) / 4)


def consistency_scalings(sigma: Array, sigma_data: float, sigma_min: float) -> Scalings:
    """Consistency preconditioning: the identity at σ = sigma_min (consistency models, appendix C)."""
    gap = sigma - sigma_min
    root = jnp.sqrt(sigma**2 + sigma_data**2)
    return Scalings(sigma_data**2 / (gap**2 + sigma_data**2), gap * sigma_data / root, 1 / root, jnp.log(sigma) / 4)


def precondition(network: Network, scalings: Scalings, x: Array) -> Array:
    """skip · x + out · F(in · x, tau) for x (batch, …)."""
    skip, out, into = (over_axes_of(c, x) for c in scalings[:3])
    return skip * x + out * network(into * x, scalings.tau)


def clip_waveform(x: Array, clip: float) -> Array:
    """Clamp to [-clip, clip]; 0 leaves x alone."""
    return jnp.clip(x, -clip, clip) if clip else x


def make_denoiser(network: Network, sigma_data: float, clip: float = 0.0) -> Denoiser:
    """D(x, σ) with the EDM scalings, clamped to ±clip as the released diffusion model is (clip 1), or not (clip 0)."""
    return lambda x, sigma: clip_waveform(precondition(network, edm_scalings(sigma, sigma_data), x), clip)


def make_consistency(network: Network, sigma_data: float, sigma_min: float) -> Denoiser:
    """f(x, σ) with the consistency scalings; never clamped."""
    return lambda x, sigma: precondition(network, consistency_scalings(sigma, sigma_data, sigma_min), x)


def edm_weight(sigma: Array, sigma_data: float) -> Array:
    """Loss weight (σ² + σ_data²)/(σ σ_data)², which gives every level an effective weight of one on F (EDM table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
