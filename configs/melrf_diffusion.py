"""Diffusion refinement of a Mel-Band RoFormer, by the recipe of `bsrf_diffusion.py`.

    msr train --config configs/melrf_diffusion.py --workdir runs/melrf_diffusion --config.init_from.deterministic=MODEL …

MODEL may be a public checkpoint of these sizes (`msr import`). No figure is published for it.
"""

from ml_collections import ConfigDict

from msr_jax.config import melrf_base
from msr_jax.configs import bsrf_diffusion


def get_config() -> ConfigDict:
    config = bsrf_diffusion.get_config()
    config.model = melrf_base().model
    return config
