"""Deterministic stage of a small BS-RoFormer that trains in minutes on a CPU.

msr train --config configs/bsrf_det_small.py --workdir runs/bsrf_det --config.data.train=RECORDS
"""

from ml_collections import ConfigDict

from msr_jax.config import bsrf_small


def get_config() -> ConfigDict:
    config = bsrf_small()
    config.method = "deterministic"
    return config
