"""Deterministic U-Net on Slakh2100, 405 M parameters (paper section on the deterministic separator).

    msr train --config configs/unet_det.py --workdir runs/unet_det --config.data.train=RECORDS --config.data.validation=RECORDS

Published: SI-SDRi 21.38 dB, SDR 10.86 dB on the test split, after 170 epochs at batch 50 on each of 3 devices.
"""

from ml_collections import ConfigDict

from msr_jax.config import unet_base


def get_config() -> ConfigDict:
    config = unet_base()
    config.method = "deterministic"
    config.data.batch = 150
    config.train.steps = 500_000
    return config
