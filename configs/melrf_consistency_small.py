"""Consistency stage of a small Mel-Band RoFormer that trains in minutes on a CPU.

msr train --config configs/melrf_consistency_small.py --workdir runs/melrf_consistency --config.data.train=RECORDS --config.init_from.diffusion=runs/melrf_diffusion
"""

from ml_collections import ConfigDict

from msr_jax.configs import bsrf_consistency_small, melrf_det_small


def get_config() -> ConfigDict:
    config = bsrf_consistency_small.get_config()
    config.model = melrf_det_small.get_config().model
    return config
