"""Diffusion stage of a small Mel-Band RoFormer that trains in minutes on a CPU.

msr train --config configs/melrf_diffusion_small.py --workdir runs/melrf_diffusion --config.data.train=RECORDS --config.init_from.deterministic=runs/melrf_det
"""

from ml_collections import ConfigDict

from msr_jax.configs import bsrf_diffusion_small, melrf_det_small


def get_config() -> ConfigDict:
    config = bsrf_diffusion_small.get_config()
    config.model = melrf_det_small.get_config().model
    return config
