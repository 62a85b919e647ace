"""Second deterministic stage of the bundled model; `launch/study/study.sh` trains it, on tracks that the separator has not heard.

msr train --config configs/bundled_det_x2.py --workdir runs/bundled_det_x2 --config.data.train=FRESH_RECORDS --config.init_from.deterministic=runs/bundled_det --config.init_from.start=runs/bundled_start
"""

from ml_collections import ConfigDict

from msr_jax.configs import bundled_diffusion


def get_config() -> ConfigDict:
    config = bundled_diffusion.get_config()
    config.method = "det_x2"
    config.diffusion.control_sigma = 0.5
    return config
