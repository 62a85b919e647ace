"""Deterministic stage of a small U-Net that trains in minutes on a CPU; the demo's.

msr train --config configs/unet_det_small.py --workdir runs/det --config.data.train=RECORDS
"""

from ml_collections import ConfigDict

from msr_jax.config import unet_small


def get_config() -> ConfigDict:
    config = unet_small()
    config.method = "deterministic"
    config.train.steps = 2500
    return config
