"""Second deterministic stage of the short study: the diffusion stage's control, without noise and without being told σ.

msr train --config configs/short_det_x2.py --workdir runs/short_det_x2 --config.data.train=RECORDS --config.init_from.deterministic=runs/short_det
"""

from ml_collections import ConfigDict

from msr_jax.configs import short_diffusion


def get_config() -> ConfigDict:
    config = short_diffusion.get_config()
    config.method = "det_x2"
    config.diffusion.control_sigma = 1.0
    return config
