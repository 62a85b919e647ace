"""Diffusion stage of a small U-Net that trains in minutes on a CPU; the demo's.

msr train --config configs/unet_diffusion_small.py --workdir runs/diffusion --config.data.train=RECORDS --config.init_from.deterministic=runs/det
"""

from ml_collections import ConfigDict

from msr_jax.configs import unet_det_small


def get_config() -> ConfigDict:
    config = unet_det_small.get_config()
    config.method = "diffusion"
    config.init_from.warm_start = True
    config.optim.lr = 5e-4
    config.train.steps = 300
    return config
