"""Det×2 control: a second deterministic U-Net on top of the frozen first (paper, comparison with Det.+Diff.).

    msr train --config configs/unet_det_x2.py --workdir runs/unet_det_x2 --config.init_from.deterministic=runs/unet_det …

Published: between the deterministic and the diffusion model. Its recipe is not: this is that of the diffusion stage,
which it is compared with.
"""

from ml_collections import ConfigDict

from msr_jax.config import unet_base


def get_config() -> ConfigDict:
    config = unet_base()
    config.method = "det_x2"
    config.data.batch = 50
    config.train.steps = 2_000_000
    return config
