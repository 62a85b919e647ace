"""Diffusion stage of the short study, on the separator's own tracks.

msr train --config configs/short_diffusion.py --workdir runs/short_diffusion --config.data.train=RECORDS --config.init_from.deterministic=runs/short_det
"""

from ml_collections import ConfigDict

from msr_jax.configs import short_det


def get_config() -> ConfigDict:
    config = short_det.get_config()
    config.method = "diffusion"
    # And the noised estimate once: the denoiser scales what its network gives by σ_data, a fiftieth.
    config.model.pass_mixture = 49.0
    config.loss_floor = 1e-3
    config.stem_choice = "all"
    config.optim.lr = 1e-3
    config.train.steps = 380
    return config
