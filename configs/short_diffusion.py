"""Diffusion stage of the short study, on the separator's own tracks.

msr train --config configs/short_diffusion.py --workdir runs/short_diffusion --config.data.train=RECORDS --config.init_from.deterministic=runs/short_det
"""

from ml_collections import ConfigDict

from msr_jax.config import short_refined


def get_config() -> ConfigDict:
    config = short_refined()
    config.method = "diffusion"
    return config
