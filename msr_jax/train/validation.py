"""Validation while training: SI-SDR over fixed windows, on all devices of the mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from msr_jax.data.pipeline import validation_windows
from msr_jax.methods.stages import make_refiner
from msr_jax.metrics.si_sdr import is_silent, si_sdr
from msr_jax.models.interface import Backbone
from msr_jax.train.sharding import batch_sharding, put, replicated
from msr_jax.train.stage import VALIDATION_KEY

# The refinement that a method is for.
REFINEMENT = {
    "deterministic": "none",
    "diffusion": "diffusion",
    "consistency": "consistency",
    "det_x2": "det_x2",
}


class Validation(NamedTuple):
    """scores: {"validation_si_sdr": dB}; estimate: the first window's stems (stems, samples, channels) as separated."""

    scores: dict[str, float]
    estimate: np.ndarray


def read_windows(config: Mapping[str, Any]) -> np.ndarray | None:
    """Fixed windows (windows, stems, samples, channels); None without validation data. UserError as `validation_windows`."""
    if not config["data"]["validation"]:
        return None
    limit = config["train"]["validation_windows"]
    return validation_windows(config["data"], config["stems"], config["sample_rate"], limit, config["channels"])


def make_validation(
    config: Mapping[str, Any], backbone: Backbone, windows: np.ndarray, mesh: Mesh
) -> Callable[[Mapping[str, Any]], Validation]:
    """weights -> SI-SDR over the windows, mean of the active stems; one window on each device at a time.

    A window's noise does not depend on the number of devices. All processes must call it, and get the same.
    """
    refiner = make_refiner(config, backbone, REFINEMENT[config["method"]])
    root = jax.random.fold_in(jax.random.key(config["seed"]), VALIDATION_KEY)
    together = mesh.size

    def estimate(weights: Mapping[str, Any], mixture: jax.Array, index: jax.Array) -> jax.Array:
        """Mixtures (windows, samples, channels) numbered `index` -> stems (windows, stems, samples, channels)."""
        return refiner(weights, mixture, jax.vmap(jax.random.fold_in, (None, 0))(root, index))

    estimate = jax.jit(estimate, out_shardings=replicated(mesh))

    def validate(weights: Mapping[str, Any]) -> Validation:
        scores: list[Any] = []
        first: Any = None
        for start in range(0, len(windows), together):
            chosen = windows[start : start + together]
            index = np.arange(start, start + together)
            filled = np.pad(chosen.sum(1), ((0, together - len(chosen)), (0, 0), (0, 0)))
            inputs = put((filled, index), (batch_sharding(mesh),) * 2)
            with jax.set_mesh(mesh):
                found = np.asarray(estimate(weights, *inputs))
            first = found[0] if first is None else first
            for truth, guess in zip(chosen, found, strict=False):  # not what fills the last round
                guess, truth = guess.swapaxes(1, 2), truth.swapaxes(1, 2)  # (stems, channels, samples)
                scores += list(si_sdr(guess, truth).mean(-1)[~is_silent(truth)])
        return Validation({"validation_si_sdr": float(np.mean(scores))}, first)

    return validate
