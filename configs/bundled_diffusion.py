"""Diffusion stage of the bundled model; `launch/study/study.sh` trains it, on tracks that the separator has not heard.

msr train --config configs/bundled_diffusion.py --workdir runs/bundled_diffusion --config.data.train=FRESH_RECORDS --config.init_from.deterministic=runs/bundled_det --config.init_from.start=runs/bundled_start
"""

from ml_collections import ConfigDict

from msr_jax.configs import bundled_det


def get_config() -> ConfigDict:
    config = bundled_det.get_config()
    config.method = "diffusion"
    config.loss_floor = 1e-3
    config.stem_choice = "all"
    config.optim.update({"lr": 3e-4, "decay_steps": 0})
    config.train.steps = 110
    return config
