"""The three stages of the method, built from a config and a backbone: training objectives and the refiner.

Training and separation take these two functions and know neither networks nor noise; `evaluate.sweep`, which varies the noise,
takes the samplers themselves. Of a backbone this file knows the interface alone, the rest of `methods` a function.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msr_jax.devices import platform
from msr_jax.errors import UserError
from msr_jax.methods.consistency import distillation_loss, draw_levels, teach
from msr_jax.methods.denoiser import Network, make_consistency, make_denoiser, over_axes_of
from msr_jax.methods.diffusion import denoising_loss, mix_estimate
from msr_jax.methods.losses import DISTANCES, gain_db, make_distance
from msr_jax.methods.samplers import SOLVERS, noise_from_keys, refine_by_consistency, refine_by_diffusion
from msr_jax.methods.schedules import (
    consistency_sigmas,
    distillation_sigma,
    karras_sigmas,
    lognormal_sigma,
    sampler_sigmas,
)
from msr_jax.models.interface import Backbone

Array = jax.Array
Params = Any
Objective = Callable[[Params, Mapping[str, Params], Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]
# (params, frozen, mixture (batch, time, channels), stems (batch, stems, time, channels), label, key) -> as `Objective`
StageLoss = Callable[[Params, Mapping[str, Params], Array, Array, Array, Array], tuple[Array, dict[str, Array]]]
Sample = Callable[
    [Network, Array, Any], Array
]  # (network, estimate (batch, time, channels), its noise or None) -> refined
REFINEMENTS = ("none", "det_x2", "diffusion", "consistency")
SAMPLED = ("diffusion", "consistency")  # the refinements that draw noise, in so many steps
DROPOUT = 2**31 - 1  # folded into a step's key
QUIET = 1e-4  # RMS below which a mixture counts as silence and is not brought to the level of the others


def level_gain(mixture: Array, input_level: float) -> Array:
    """Factor (batch,) that brings each mixture (batch, time, channels) to RMS `input_level`; 1 where that is 0."""
    if not input_level:
        return jnp.ones(mixture.shape[:1])
    rms = jnp.sqrt(jnp.square(mixture).mean((1, 2)))
    return input_level / jnp.maximum(rms, QUIET)


# Below, label (batch or 1, k, stems) is one-hot and names k stems of each mixture; examples (batch · k, …) are those of the
# first mixture, then those of the second.


def _wide(label: Array, batch: int) -> Array:
    return jnp.broadcast_to(label, (batch, *label.shape[1:]))


def _pick(stems: Array, label: Array) -> Array:
    """The stems (batch · k, time, channels) of stems (batch, stems, time, channels) that the label names, exactly."""
    picked = jnp.einsum("bks,bstc->bktc", _wide(label, len(stems)), stems, precision="highest")
    return picked.reshape(-1, *stems.shape[2:])


def _estimate(
    backbone: Backbone, params: Params, mixture: Array, label: Array, key: Array | None = None
) -> tuple[Array, Any]:
    """The deterministic network's estimates (batch · k, time, channels) of those stems, and its features.

    A network that gives all stems at once runs once for a mixture.
    """
    if not backbone.stems_together:
        rows = _wide(label, len(mixture)).reshape(-1, label.shape[2])
        return backbone.separate(params, jnp.repeat(mixture, label.shape[1], 0), rows, key)
    estimate, features = backbone.separate(params, mixture, None, key)
    return _pick(estimate, label), features


def _conditioned(
    backbone: Backbone, params: Params, label: Array, features: Any, in_training: bool = False
) -> Callable[[Array | None], Network]:
    """Key of dropout, or None -> network; all of them share what does not depend on noise level and stem."""
    condition = backbone.defer if in_training and backbone.defer else backbone.condition
    conditioning, rows = condition(params, features), label.reshape(-1, label.shape[2])
    return lambda key: lambda x, tau: backbone.refine(params, x, rows, tau, conditioning, key)


def make_objective(config: Mapping[str, Any], backbone: Backbone) -> Objective:
    """The training loss of `config["method"]`.

    Returns:
      loss_fn(params, frozen, batch, key) -> (scalar loss, dict of scalar metrics), pure; to be differentiated in params.
      batch: {"stems": (batch, stems, time, channels), "label": (batch, stems) one-hot}; the mixture is the sum of stems.
      The target of a mixture is the stem of its label, or one drawn for the whole batch, or every stem in turn
      (`stem_choice`); for a deterministic network that gives all stems at once, all of them.
      frozen: {} for "deterministic"; {"deterministic"} for "diffusion" and "det_x2"; {"deterministic", "teacher", "target"}
      for "consistency", where "target" is the running average of params.

    Raises:
      UserError: the config names an unknown method or loss.
    """
    makers = {
        "deterministic": _deterministic,
        "det_x2": _second_deterministic,
        "diffusion": _diffusion,
        "consistency": _consistency,
    }
    for name, known in (("method", makers), ("loss", DISTANCES)):
        if config[name] not in known:
            raise UserError(f"config.{name} must be one of {', '.join(known)}, not '{config[name]}'")
    stage_loss = makers[config["method"]](config, backbone)

    def loss_fn(
        params: Params, frozen: Mapping[str, Params], batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        stems, label = batch["stems"], batch["label"][:, None]
        if config["stem_choice"] == "batch":
            key, key_stem = jax.random.split(key)
            label = jax.nn.one_hot(jax.random.randint(key_stem, (1, 1), 0, stems.shape[1]), stems.shape[1])
        elif config["stem_choice"] == "all":
            label = jnp.eye(stems.shape[1])[None]
        mixture = stems.sum(1)
        gain = over_axes_of(level_gain(mixture, config["input_level"]), stems)
        return stage_loss(params, frozen, mixture * gain[:, 0], stems * gain, label, key)

    return loss_fn


def _deterministic(config: Mapping[str, Any], backbone: Backbone) -> StageLoss:
    distance = make_distance(config)

    def loss_fn(
        params: Params, frozen: Mapping[str, Params], mixture: Array, stems: Array, label: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        if not backbone.stems_together:
            return distance(_estimate(backbone, params, mixture, label, key)[0], _pick(stems, label)).mean(), {}
        estimate, _ = backbone.separate(params, mixture, None, key)
        as_channels = lambda x: jnp.moveaxis(x, 1, 2).reshape(len(x), x.shape[2], -1)
        return distance(as_channels(estimate), as_channels(stems)).mean(), {}

    return loss_fn


def _second_deterministic(config: Mapping[str, Any], backbone: Backbone) -> StageLoss:
    """Control of the paper: a second network on top of the frozen first, like a refinement but without noise."""
    distance, one_pass = make_distance(config), _one_pass(config)

    def loss_fn(
        params: Params, frozen: Mapping[str, Params], mixture: Array, stems: Array, label: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        estimate, features = _estimate(backbone, frozen["deterministic"], mixture, label)
        network, target = _conditioned(backbone, params, label, features, True)(key), _pick(stems, label)
        refined = one_pass(network, estimate, None)
        return distance(refined, target).mean(), {"gain_db": gain_db(estimate, refined, target)}

    return loss_fn


def _diffusion(config: Mapping[str, Any], backbone: Backbone) -> StageLoss:
    c, distance = config["diffusion"], make_distance(config)

    def loss_fn(
        params: Params, frozen: Mapping[str, Params], mixture: Array, stems: Array, label: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        key_sigma, key_noise, key_mix = jax.random.split(key, 3)
        target = _pick(stems, label)
        estimate, features = _estimate(backbone, frozen["deterministic"], mixture, label)
        sigma = lognormal_sigma(jax.random.normal(key_sigma, target.shape[:1]), c["p_mean"], c["p_std"])
        start = _start(key_mix, target, estimate, c["estimate_probability"])
        noise = jax.random.normal(key_noise, target.shape)
        network = _conditioned(backbone, params, label, features, True)(jax.random.fold_in(key, DROPOUT))
        loss, found = denoising_loss(
            network, target, start, sigma, noise,
            sigma_data=c["sigma_data"], clip=c["clip"], weighted=c["loss_weight"] == "edm", distance=distance,
        )  # fmt: skip
        if c["estimate_probability"] < 1:  # from clean stems there is nothing to gain
            return loss, {}
        return loss, {"gain_db": gain_db(estimate, found["denoised"], target)}

    return loss_fn


def _start(key: Array, clean: Array, estimate: Array, probability: float) -> Array:
    if not probability:
        return clean
    return mix_estimate(clean, estimate, jax.random.bernoulli(key, probability, clean.shape[:1]).astype(clean.dtype))


def _consistency(config: Mapping[str, Any], backbone: Backbone) -> StageLoss:
    c, d, distance = config["consistency"], config["diffusion"], make_distance(config)
    grid = karras_sigmas(c["num_levels"], c["sigma_min"], c["sigma_max"], c["rho"])

    def loss_fn(
        params: Params, frozen: Mapping[str, Params], mixture: Array, stems: Array, label: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        key_level, key_noise, key_mix, key_normal, key_uniform, key_denoise = jax.random.split(key, 6)
        target = _pick(stems, label)
        batch = len(target)
        estimate, features = _estimate(backbone, frozen["deterministic"], mixture, label)
        dropout_keys = jax.random.split(jax.random.fold_in(key, DROPOUT), 3)  # of all but the teacher, as released
        start = _start(key_mix, target, estimate, d["estimate_probability"])
        level, num_steps = draw_levels(key_level, batch, c["num_levels"], c["draw"])
        # The teacher goes through many times, and its adapted features are held for that; the others' are made layer by layer.
        teacher = _conditioned(backbone, frozen["teacher"], label, features)(None)
        noise = jax.random.normal(key_noise, target.shape)
        noised, solved = teach(teacher, start, noise, level, num_steps, grid, sigma_data=c["sigma_data"])
        if backbone.defer and platform() != "cpu":
            # Its features are large: made once more, they need not lie beside the teacher's.
            mixture, noised, solved = jax.lax.optimization_barrier((mixture, noised, solved))
            _, features = _estimate(backbone, frozen["deterministic"], mixture, label)
        student, averaged = (_conditioned(backbone, p, label, features, True) for p in (params, frozen["target"]))
        distilled, _ = distillation_loss(
            student(dropout_keys[0]), averaged(dropout_keys[1]), noised, solved, level, num_steps, grid,
            sigma_data=c["sigma_data"], sigma_min=c["sigma_min"], distance=distance,
        )  # fmt: skip
        sigma = distillation_sigma(
            jax.random.normal(key_normal, (batch // 2,)),
            jax.random.uniform(key_uniform, (batch - batch // 2,)),
            d["p_mean"], d["p_std"], c["sigma_min"], c["sigma_max"], c["rho"], c["dsm_uniform_limit"],
        )  # fmt: skip
        noise = jax.random.normal(key_denoise, target.shape)
        denoised, _ = denoising_loss(
            student(dropout_keys[2]), target, start, sigma, noise,
            sigma_data=c["sigma_data"], weighted=d["loss_weight"] == "edm", distance=distance,
        )  # fmt: skip
        loss = c["consistency_weight"] * distilled + c["dsm_weight"] * denoised
        return loss, {"loss_distillation": distilled, "loss_denoising": denoised}

    return loss_fn


def own_steps(config: Mapping[str, Any], refine: str) -> int | None:
    """The number of refinement steps that a model's config names; None for a refinement that takes none."""
    return config[refine]["sampler"]["num_steps"] if refine in SAMPLED else None


def make_refiner(
    config: Mapping[str, Any],
    backbone: Backbone,
    refine: str = "none",
    num_steps: int | None = None,
    one_by_one: bool = False,
    chosen: Sequence[int] | None = None,
) -> Callable[[Mapping[str, Params], Array, Array], Array]:
    """Mixture to stem estimates: the deterministic network, then the chosen refinement.

    Args:
      refine: one of `REFINEMENTS`.
      num_steps: T of the sampler, for those in `SAMPLED`; None takes the config's.
      one_by_one: refine one stem after another instead of all in one batch: less memory, the same result.
      chosen: numbers of the stems that come out, in the order of the config's; None is all. A stem comes out the same
        whichever others do.

    Returns:
      refiner(weights, mixture (batch, time, channels), keys) -> estimates (batch, chosen stems, time, channels), to be jitted by the
      caller. `weights` maps network names to parameters. `keys` is one key, or one per example (batch,), which makes an
      example's noise independent of its batch.

    Raises:
      UserError: unknown refinement, a number of steps that is not whole or below 1, or one for a refinement that takes no steps.
    """
    if refine not in REFINEMENTS:
        raise UserError(f"refine must be one of {', '.join(REFINEMENTS)}, not '{refine}'")
    if num_steps is not None and not (isinstance(num_steps, int | np.integer) and num_steps >= 1):
        raise UserError(f"the number of refinement steps must be a whole number, at least 1, not {num_steps!r}")
    if num_steps is not None and refine not in SAMPLED:
        raise UserError(
            f"a number of steps goes with refinement by {' or '.join(SAMPLED)}, and here it is {refine}; leave it out"
        )
    samplers = {
        "none": _no_refinement,
        "det_x2": _one_pass,
        "diffusion": _diffusion_sampler,
        "consistency": _consistency_sampler,
    }
    sample, network_name = samplers[refine](config, num_steps), network_of(config, refine)
    count, is_random = len(config["stems"]), refine in SAMPLED
    wanted = jnp.arange(count) if chosen is None else jnp.asarray(chosen)
    numbers = jnp.asarray(config.get("stem_numbers", range(count)))  # of a model that was loaded with some of its stems

    def refiner(weights: Mapping[str, Params], mixture: Array, keys: Array) -> Array:
        batch = len(mixture)
        gain = over_axes_of(level_gain(mixture, config["input_level"]), mixture)
        mixture = mixture * gain
        keys = keys if keys.ndim or not is_random else jax.random.split(keys, batch)

        def noise_of(stems: Array, shape: tuple[int, ...]) -> Any:
            stem_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, numbers[stems]).reshape(-1)
            return noise_from_keys(stem_keys, shape)

        def separate(mixture: Array, label: Array | None) -> tuple[Array, Any]:
            estimate, features = backbone.separate(weights["deterministic"], mixture, label)
            is_last = network_name == "deterministic"
            return estimate, None if is_last else backbone.condition(weights[network_name], features)

        # Before the loop over stems: there is one such pass, and one set of adapted features, for a mixture.
        together = separate(mixture, None) if backbone.stems_together else None

        def run(stems: Array) -> Array:
            """Indices (k,) -> (batch, k, time, channels)."""
            k, label = len(stems), jax.nn.one_hot(stems, count)
            if together:
                estimate, conditioning = together[0][:, stems].reshape(-1, *mixture.shape[1:]), together[1]
            else:
                estimate, conditioning = separate(jnp.repeat(mixture, k, 0), jnp.tile(label, (batch, 1)))
            noise = noise_of(stems, estimate.shape) if is_random else None
            network = lambda x, tau: backbone.refine(weights[network_name], x, label, tau, conditioning)
            estimate = sample(network, estimate, noise)
            return estimate.reshape(batch, k, *mixture.shape[1:])

        if one_by_one:
            stems = jax.lax.map(lambda s: run(s[None])[:, 0], wanted).swapaxes(0, 1)
        else:
            stems = run(wanted)
        return stems / gain[:, None]

    return refiner


def network_of(config: Mapping[str, Any], refine: str) -> str:
    """Name of the weights that a refinement samples with: the student's, or its running average where the config says so."""
    if refine == "none":
        return "deterministic"
    return "target" if refine == "consistency" and config["consistency"]["evaluate"] == "target" else refine


def _no_refinement(config: Mapping[str, Any], num_steps: int | None) -> Sample:
    return lambda network, estimate, noise: estimate


def _one_pass(config: Mapping[str, Any], num_steps: int | None = None) -> Sample:
    """The second deterministic network on the estimate; with `diffusion.control_sigma`, inside the denoiser of that level."""
    c = config["diffusion"]
    sigma = c.get("control_sigma", 0.0)  # older model folders have none

    def run(network: Network, estimate: Array, noise: None = None) -> Array:
        if not sigma:
            return network(estimate, None)
        denoise = make_denoiser(lambda x, tau: network(x, None), c["sigma_data"])
        return denoise(estimate, jnp.full(estimate.shape[:1], sigma))

    return run


def _diffusion_sampler(config: Mapping[str, Any], num_steps: int | None) -> Sample:
    c, s = config["diffusion"], config["diffusion"]["sampler"]
    if s["solver"] not in SOLVERS:
        raise UserError(f"diffusion.sampler.solver must be one of {', '.join(SOLVERS)}, not '{s['solver']}'")
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


def _consistency_sampler(config: Mapping[str, Any], num_steps: int | None) -> Sample:
    c, s = config["consistency"], config["consistency"]["sampler"]
    sigmas = consistency_sigmas(num_steps or s["num_steps"], c["sigma_min"], s["sigma_max"], c["rho"])
    options = {"sigma_min": c["sigma_min"], "renoise": s["renoise"], "clip": s["clip"]}
    return lambda network, estimate, noise: refine_by_consistency(
        make_consistency(network, c["sigma_data"], c["sigma_min"]), estimate, sigmas, noise, **options
    )
