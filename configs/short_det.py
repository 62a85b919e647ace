"""Deterministic stage of the short study; `launch/study/study.sh OUT short` trains it in a quarter of an hour.

msr train --config configs/short_det.py --workdir runs/short_det --config.data.train=RECORDS
"""

from ml_collections import ConfigDict

from msr_jax.configs import bundled_det


def get_config() -> ConfigDict:
    c = bundled_det.get_config()
    # A refinement begins with the frozen separator's own parameters. σ_data far below every σ: next to nothing of the input is
    # kept, and the separator's masks, on the mixture that is passed to them, give the estimate from the first step on.
    c.model.mask_scale = 1.0
    c.diffusion.update({"sigma_data": 0.02, "p_mean": -0.25, "p_std": 0.8})
    c.diffusion.sampler.update({"sigma_min": 0.5, "sigma_max": 1.0})
    c.consistency.update({"sigma_data": 0.02, "sigma_min": 0.15, "sigma_max": 4.0})
    c.consistency.sampler.sigma_max = 4.0
    c.optim.decay_steps = 0
    c.train.steps = 600
    return c
