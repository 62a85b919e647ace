"""Deterministic stage of a small Mel-Band RoFormer that trains in minutes on a CPU.

msr train --config configs/melrf_det_small.py --workdir runs/melrf_det --config.data.train=RECORDS
"""

from ml_collections import ConfigDict

from msr_jax.config import melrf_base
from msr_jax.configs import bsrf_det_small


def get_config() -> ConfigDict:
    # The recipe and sizes of the small BS-RoFormer, but for the bands.
    config = bsrf_det_small.get_config()
    sizes = config.model.to_dict()
    config.model = melrf_base().model
    config.model.update({name: sizes[name] for name in sizes if name not in ("name", "freqs_per_bands")})
    config.model.update({"num_bands": 28, "mask_estimator_depth": 1})  # two linear layers, as there
    return config
