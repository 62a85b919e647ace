"""Deterministic BS-RoFormer on MUSDB18-HQ, 131.7 M parameters (paper section on the deterministic separator).

    msr train --config configs/bsrf_det.py --workdir runs/bsrf_det --config.data.train=RECORDS --config.data.validation=RECORDS

Published: SI-SDRi 15.10 dB, SDR 10.00 dB on the test split. The published model is a public checkpoint (`msr import`), fine-tuned
by Prodigy at rate 1.0, batch 8 on each of 3 devices.
"""

from ml_collections import ConfigDict

from msr_jax.config import bsrf_base


def get_config() -> ConfigDict:
    config = bsrf_base()
    config.method = "deterministic"
    config.data.batch = 24
    config.optim.update({"name": "prodigy", "lr": 1.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8})
    config.train.steps = 500_000
    return config
