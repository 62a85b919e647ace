"""Diffusion refinement of the deterministic BS-RoFormer (paper section on diffusion refinement).

    msr train --config configs/bsrf_diffusion.py --workdir runs/bsrf_diffusion --config.init_from.deterministic=MODEL …

Published: SI-SDRi 15.57 dB, SDR 10.58 dB on the test split with T = 3, after 80 x 4000 steps at batch 6 on each of 3 devices.
"""

from ml_collections import ConfigDict

from msr_jax.config import bsrf_base


def get_config() -> ConfigDict:
    config = bsrf_base()
    config.method = "diffusion"
    config.data.batch = 18
    config.train.steps = 320_000
    return config
