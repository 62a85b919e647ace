"""Consistency stage of a small U-Net that trains in minutes on a CPU; the demo's.

msr train --config configs/unet_consistency_small.py --workdir runs/consistency --config.data.train=RECORDS --config.init_from.diffusion=runs/diffusion
"""

from ml_collections import ConfigDict

from msr_jax.configs import unet_det_small


def get_config() -> ConfigDict:
    config = unet_det_small.get_config()
    config.method = "consistency"
    config.optim.update({"name": "radam", "lr": 1e-4, "b1": 0.9, "b2": 0.999})
    config.consistency.target_rate = 0.99
    config.train.steps = 100
    return config
