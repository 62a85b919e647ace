"""Deterministic stage of the bundled model; `launch/study.sh` trains it.

msr train --config configs/bundled_det.py --workdir runs/bundled_det --config.data.train=RECORDS
"""

from ml_collections import ConfigDict

from msr_jax.config import bundled


def get_config() -> ConfigDict:
    config = bundled()
    config.method = "deterministic"
    config.optim.update({"schedule": "linear", "decay_steps": 5400})
    config.train.steps = 16_400
    return config
