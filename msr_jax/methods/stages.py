"""The three stages of the method, built from a config and a backbone: training objectives and the refiner.

Everything above this file in the package (training, separation, evaluation) uses these two functions and knows neither
networks nor noise; everything here takes the network as a function and knows no backbone.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from msr_jax.errors import UserError
from msr_jax.methods.consistency import distillation_loss, draw_levels
from msr_jax.methods.denoiser import Network, make_consistency, make_denoiser, per_example
from msr_jax.methods.det_x2 import det_x2_loss, estimate_again
from msr_jax.methods.diffusion import denoising_loss, mix_estimate
from msr_jax.methods.losses import DISTANCES
from msr_jax.methods.samplers import noise_from_keys, refine_by_consistency, refine_by_diffusion
from msr_jax.methods.schedules import (
    consistency_sigmas,
    distillation_sigma,
    karras_sigmas,
    lognormal_sigma,
    sampler_sigmas,
)
from msr_jax.models.backbone import Backbone

Array = jax.Array
Params = Any
Objective = Callable[[Params, Mapping[str, Params], Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]
REFINEMENTS = ("none", "diffusion", "consistency", "det_x2")
QUIET = 1e-4  # RMS below which a mixture counts as silence and is not brought to the level of the others


def level_gain(mixture: Array, input_level: float) -> Array:
    """Factor (batch,) that brings each mixture (batch, time, channels) to RMS `input_level`; 1 where that is 0."""
    if not input_level:
        return jnp.ones(mixture.shape[:1])
    rms = jnp.sqrt(jnp.square(mixture).mean((1, 2)))
    return input_level / jnp.maximum(rms, QUIET)


def _conditioned(backbone: Backbone, params: Params, label: Array, features: list[Array]) -> Network:
    return lambda x, tau: backbone.apply(params, x, label, tau, features)[0]


def make_objective(config: Mapping[str, Any], backbone: Backbone) -> Objective:
    """The training loss of `config["method"]`.

    Returns:
      loss_fn(params, frozen, batch, key) -> (scalar loss, dict of scalar metrics), pure; to be differentiated in params.
      batch: {"stems": (batch, stems, time, channels), "label": (batch, stems) one-hot}; the mixture is the sum of stems.
      frozen: {} for "deterministic"; {"deterministic"} for "diffusion" and "det_x2"; {"deterministic", "teacher", "target"} for
      "consistency", where "target" is the running average of params.

    Raises:
      UserError: the config names an unknown method or loss.
    """
    makers = {"deterministic": _deterministic, "diffusion": _diffusion, "consistency": _consistency, "det_x2": _det_x2}
    if config["method"] not in makers:
        raise UserError(f"config.method must be one of {', '.join(makers)}, not '{config['method']}'")
    if config["loss"] not in DISTANCES:
        raise UserError(f"config.loss must be one of {', '.join(DISTANCES)}, not '{config['loss']}'")
    stage_loss = makers[config["method"]](config, backbone)

    def loss_fn(params, frozen, batch, key):
        mixture = batch["stems"].sum(1)
        target = jnp.einsum("bs,bstc->btc", batch["label"], batch["stems"], precision="highest")  # picks, exactly
        gain = per_example(level_gain(mixture, config["input_level"]), mixture)
        return stage_loss(params, frozen, mixture * gain, target * gain, batch["label"], key)

    return loss_fn


def _deterministic(config: Mapping[str, Any], backbone: Backbone):
    distance = DISTANCES[config["loss"]]

    def loss_fn(params, frozen, mixture, target, label, key):
        estimate, _ = backbone.apply(params, mixture, label)
        return distance(estimate, target).mean(), {}

    return loss_fn


def _det_x2(config: Mapping[str, Any], backbone: Backbone):
    return det_x2_loss(backbone, DISTANCES[config["loss"]])


def _diffusion(config: Mapping[str, Any], backbone: Backbone):
    c, distance = config["diffusion"], DISTANCES[config["loss"]]

    def loss_fn(params, frozen, mixture, target, label, key):
        key_sigma, key_noise, key_mix = jax.random.split(key, 3)
        estimate, features = backbone.apply(frozen["deterministic"], mixture, label)
        sigma = lognormal_sigma(jax.random.normal(key_sigma, target.shape[:1]), c["p_mean"], c["p_std"])
        start = _start(key_mix, target, estimate, c["estimate_probability"])
        noise = jax.random.normal(key_noise, target.shape)
        network = _conditioned(backbone, params, label, features)
        loss, _ = denoising_loss(
            network, target, start, sigma, noise,
            sigma_data=c["sigma_data"], clip=c["clip"], weighted=c["loss_weight"] == "edm", distance=distance,
        )  # fmt: skip
        return loss, {}

    return loss_fn


def _start(key: Array, clean: Array, estimate: Array, probability: float) -> Array:
    if not probability:
        return clean
    return mix_estimate(clean, estimate, jax.random.bernoulli(key, probability, clean.shape[:1]).astype(clean.dtype))


def _consistency(config: Mapping[str, Any], backbone: Backbone):
    c, d, distance = config["consistency"], config["diffusion"], DISTANCES[config["loss"]]
    grid = karras_sigmas(c["num_levels"], c["sigma_min"], c["sigma_max"], c["rho"])

    def loss_fn(params, frozen, mixture, target, label, key):
        key_level, key_noise, key_mix, key_normal, key_uniform, key_denoise = jax.random.split(key, 6)
        batch = target.shape[0]
        estimate, features = backbone.apply(frozen["deterministic"], mixture, label)
        networks = [_conditioned(backbone, p, label, features) for p in (params, frozen["target"], frozen["teacher"])]
        start = _start(key_mix, target, estimate, d["estimate_probability"])
        level, num_steps = draw_levels(key_level, batch, c["num_levels"], c["draw"])
        distilled, _ = distillation_loss(
            *networks, start, jax.random.normal(key_noise, target.shape), level, num_steps, grid,
            sigma_data=c["sigma_data"], sigma_min=c["sigma_min"], distance=distance,
        )  # fmt: skip
        sigma = distillation_sigma(
            jax.random.normal(key_normal, (batch // 2,)),
            jax.random.uniform(key_uniform, (batch - batch // 2,)),
            d["p_mean"], d["p_std"], c["sigma_min"], c["sigma_max"], c["rho"], c["dsm_uniform_limit"],
        )  # fmt: skip
        noise = jax.random.normal(key_denoise, target.shape)
        denoised, _ = denoising_loss(
            networks[0], target, start, sigma, noise, sigma_data=c["sigma_data"], distance=distance
        )
        loss = c["consistency_weight"] * distilled + c["dsm_weight"] * denoised
        return loss, {"loss_distillation": distilled, "loss_denoising": denoised}

    return loss_fn


def make_refiner(
    config: Mapping[str, Any], backbone: Backbone, refine: str = "none", num_steps: int | None = None
) -> Callable[[Mapping[str, Params], Array, Array, Array], Array]:
    """Mixture to stem estimate: the deterministic network, then the chosen refinement.

    Args:
      refine: "none", "diffusion", "consistency", or "det_x2" for a second deterministic network.
      num_steps: T of the sampler; None takes the config's.

    Returns:
      refiner(weights, mixture (batch, time, channels), label (batch, stems), keys) -> estimate of mixture's shape, to be
      jitted by the caller. `weights` maps network names to parameters. `keys` is one key, or one per example (batch,), which
      makes an example's noise independent of its batch.

    Raises:
      UserError: unknown refinement, or a number of steps below 1.
    """
    if refine not in REFINEMENTS:
        raise UserError(f"refine must be one of {', '.join(REFINEMENTS)}, not '{refine}'")
    if num_steps is not None and num_steps < 1:
        raise UserError(f"the number of refinement steps must be at least 1, not {num_steps}")
    if refine == "det_x2":
        return _second_estimate(config, backbone)
    sample = {"none": _no_refinement, "diffusion": _diffusion_sampler, "consistency": _consistency_sampler}[refine](
        config, num_steps
    )
    network_name = network_of(config, refine)

    def refiner(weights, mixture, label, keys):
        gain = per_example(level_gain(mixture, config["input_level"]), mixture)
        estimate, features = backbone.apply(weights["deterministic"], mixture * gain, label)
        if network_name != "deterministic":
            keys = keys if keys.ndim else jax.random.split(keys, mixture.shape[0])
            network = _conditioned(backbone, weights[network_name], label, features)
            estimate = sample(network, estimate, noise_from_keys(keys, estimate.shape))
        return estimate / gain

    return refiner


def _second_estimate(config: Mapping[str, Any], backbone: Backbone):
    def refiner(weights, mixture, label, keys):
        gain = per_example(level_gain(mixture, config["input_level"]), mixture)
        return estimate_again(backbone, weights["det_x2"], weights["deterministic"], mixture * gain, label)[1] / gain

    return refiner


def network_of(config: Mapping[str, Any], refine: str) -> str:
    """Name of the weights that a refinement samples with: the student's, or its running average where the config says so."""
    if refine == "none":
        return "deterministic"
    return "target" if refine == "consistency" and config["consistency"]["evaluate"] == "target" else refine


def _no_refinement(config: Mapping[str, Any], num_steps: int | None):
    return lambda network, estimate, noise: estimate


def _diffusion_sampler(config: Mapping[str, Any], num_steps: int | None):
    c, s = config["diffusion"], config["diffusion"]["sampler"]
    sigmas = sampler_sigmas(num_steps or s["num_steps"], s["sigma_min"], s["sigma_max"], s["rho"])
    options = {
        "num_resamples": s["num_resamples"],
        "s_churn": s["s_churn"],
        "solver": s["solver"],
        "clip": c["clip"],
    }
    return lambda network, estimate, noise: refine_by_diffusion(
        make_denoiser(network, c["sigma_data"], c["clip"]), estimate, sigmas, noise, **options
    )


def _consistency_sampler(config: Mapping[str, Any], num_steps: int | None):
    c, s = config["consistency"], config["consistency"]["sampler"]
    sigmas = consistency_sigmas(num_steps or s["num_steps"], c["sigma_min"], s["sigma_max"], c["rho"])
    options = {"sigma_min": c["sigma_min"], "renoise": s["renoise"], "clip": s["clip"]}
    return lambda network, estimate, noise: refine_by_consistency(
        make_consistency(network, c["sigma_data"], c["sigma_min"]), estimate, sigmas, noise, **options
    )
