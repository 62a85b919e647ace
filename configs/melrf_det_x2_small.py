"""Second deterministic stage of a small Mel-Band RoFormer that trains in minutes on a CPU.

msr train --config configs/melrf_det_x2_small.py --workdir runs/melrf_det_x2 --config.data.train=RECORDS --config.init_from.deterministic=runs/melrf_det
"""

from ml_collections import ConfigDict

from msr_jax.configs import bsrf_det_x2_small, melrf_det_small


def get_config() -> ConfigDict:
    config = bsrf_det_x2_small.get_config()
    config.model = melrf_det_small.get_config().model
    return config
