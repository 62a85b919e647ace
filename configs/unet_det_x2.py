"""Control of the paper: a second deterministic U-Net on top of the frozen first (section on ablations).

    msr train --config configs/unet_det_x2.py --workdir runs/unet_det_x2 --config.init_from.deterministic=runs/unet_det …

Published: between the first alone and its diffusion refinement.
"""

from ml_collections import ConfigDict

from msr_jax.config import unet_base


def get_config() -> ConfigDict:
    config = unet_base()
    config.method = "det_x2"
    config.data.batch = 50
    config.train.steps = 2_000_000
    return config
