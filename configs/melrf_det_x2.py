"""Control: a second deterministic Mel-Band RoFormer on top of the frozen first, by the recipe of `bsrf_det_x2.py`.

msr train --config configs/melrf_det_x2.py --workdir runs/melrf_det_x2 --config.init_from.deterministic=MODEL …
"""

from ml_collections import ConfigDict

from msr_jax.config import melrf_base
from msr_jax.configs import bsrf_det_x2


def get_config() -> ConfigDict:
    config = bsrf_det_x2.get_config()
    config.model = melrf_base().model
    return config
