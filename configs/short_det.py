"""Deterministic stage of the short study; `launch/study/study.sh OUT short` trains it in a quarter of an hour.

msr train --config configs/short_det.py --workdir runs/short_det --config.data.train=RECORDS
"""

from ml_collections import ConfigDict

from msr_jax.config import short


def get_config() -> ConfigDict:
    config = short()
    config.method = "deterministic"
    config.train.steps = 600
    return config
