"""Control of the paper: a second deterministic BS-RoFormer on top of the frozen first (section on ablations).

    msr train --config configs/bsrf_det_x2.py --workdir runs/bsrf_det_x2 --config.init_from.deterministic=MODEL …

Published: no better than the first alone.
"""

from ml_collections import ConfigDict

from msr_jax.config import bsrf_base


def get_config() -> ConfigDict:
    config = bsrf_base()
    config.method = "det_x2"
    config.data.batch = 18
    config.train.steps = 320_000
    return config
