"""Diffusion refinement of the deterministic U-Net (paper section on diffusion refinement).

    msr train --config configs/unet_diffusion.py --workdir runs/unet_diffusion --config.init_from.deterministic=runs/unet_det …

Published: SI-SDRi 22.75 dB, SDR 11.65 dB on the test split with T = 2, R = 2, after 280 epochs at batch 50.
"""

from ml_collections import ConfigDict

from msr_jax.config import unet_base


def get_config() -> ConfigDict:
    config = unet_base()
    config.method = "diffusion"
    config.data.batch = 50
    config.train.steps = 2_000_000
    return config
