"""Diffusion stage of a small BS-RoFormer that trains in minutes on a CPU.

msr train --config configs/bsrf_diffusion_small.py --workdir runs/bsrf_diffusion --config.data.train=RECORDS --config.init_from.deterministic=runs/bsrf_det
"""

from ml_collections import ConfigDict

from msr_jax.configs import bsrf_det_small


def get_config() -> ConfigDict:
    config = bsrf_det_small.get_config()
    config.method = "diffusion"
    config.loss = "mse"  # weighted by the noise level
    config.optim.lr = 1e-3
    config.train.steps = 300
    return config
