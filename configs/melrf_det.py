"""Deterministic Mel-Band RoFormer on MUSDB18-HQ, 832.6 M parameters, most of them in the mask heads of its four stems.

    msr train --config configs/melrf_det.py --workdir runs/melrf_det --config.data.train=RECORDS --config.data.validation=RECORDS

The recipe of `bsrf_det.py`, with the shape that most public checkpoints have. No figure is published for it.
"""

from ml_collections import ConfigDict

from msr_jax.config import melrf_base
from msr_jax.configs import bsrf_det


def get_config() -> ConfigDict:
    config = bsrf_det.get_config()
    config.model = melrf_base().model
    return config
