"""Consistency distillation of the diffusion model (paper section on consistency distillation).

    msr train --config configs/bsrf_consistency.py --workdir runs/bsrf_consistency --config.init_from.diffusion=runs/bsrf_diffusion …

Published: SI-SDRi 15.61 dB, SDR 10.60 dB on the test split with T = 1; batch 3 on each of 3 devices.
"""

from ml_collections import ConfigDict

from msr_jax.config import bsrf_base


def get_config() -> ConfigDict:
    config = bsrf_base()
    config.method = "consistency"
    config.data.batch = 9
    config.optim.update({"name": "radam", "lr": 1e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 10.0})
    config.train.steps = 600_000
    return config
