"""Consistency stage of the short study.

msr train --config configs/short_consistency.py --workdir runs/short_consistency --config.data.train=RECORDS --config.init_from.diffusion=runs/short_diffusion
"""

from ml_collections import ConfigDict

from msr_jax.configs import short_diffusion


def get_config() -> ConfigDict:
    config = short_diffusion.get_config()
    config.method = "consistency"
    config.optim.lr = 1.5e-4
    config.consistency.target_rate = 0.99
    config.ema_rate = 0.0  # the rate falls to nothing over all of this short stage
    config.train.steps = 36
    return config
