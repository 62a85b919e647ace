"""Diffusion stage of the bundled model; `launch/study.sh` trains it.

msr train --config configs/bundled_diffusion.py --workdir runs/bundled_diffusion --config.data.train=RECORDS --config.init_from.deterministic=runs/bundled_det
"""

from ml_collections import ConfigDict

from msr_jax.config import bundled


def get_config() -> ConfigDict:
    config = bundled()
    config.method = "diffusion"
    config.loss = "mse"  # weighted by the noise level
    config.optim.lr = 1e-3
    config.train.steps = 6000
    return config
