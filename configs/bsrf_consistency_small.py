"""Consistency stage of a small BS-RoFormer that trains in minutes on a CPU.

msr train --config configs/bsrf_consistency_small.py --workdir runs/bsrf_consistency --config.data.train=RECORDS --config.init_from.diffusion=runs/bsrf_diffusion
"""

from ml_collections import ConfigDict

from msr_jax.configs import bsrf_det_small


def get_config() -> ConfigDict:
    config = bsrf_det_small.get_config()
    config.method = "consistency"
    config.loss = "mse"  # weighted by the noise level
    config.optim.update({"name": "radam", "lr": 1e-4, "b1": 0.9, "b2": 0.999})
    config.consistency.target_rate = 0.99
    config.train.steps = 100
    return config
