"""Consistency stage of the bundled model; `launch/study/study.sh` trains it, on tracks that the separator has not heard.

msr train --config configs/bundled_consistency.py --workdir runs/bundled_consistency --config.data.train=FRESH_RECORDS --config.init_from.diffusion=runs/bundled_diffusion
"""

from ml_collections import ConfigDict

from msr_jax.configs import bundled_diffusion


def get_config() -> ConfigDict:
    config = bundled_diffusion.get_config()
    config.method = "consistency"
    config.optim.lr = 1.5e-4
    config.consistency.target_rate = 0.99
    config.ema_rate = 0.0  # the rate falls to nothing over all of this short stage
    config.train.steps = 36
    return config
