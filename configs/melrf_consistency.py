"""Consistency distillation of the refined Mel-Band RoFormer, by the recipe of `bsrf_consistency.py`.

msr train --config configs/melrf_consistency.py --workdir runs/melrf_consistency --config.init_from.diffusion=runs/melrf_diffusion …
"""

from ml_collections import ConfigDict

from msr_jax.config import melrf_base
from msr_jax.configs import bsrf_consistency


def get_config() -> ConfigDict:
    config = bsrf_consistency.get_config()
    config.model = melrf_base().model
    return config
