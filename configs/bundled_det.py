"""Deterministic stage of the bundled model; `launch/study.sh` trains it twice.

The refinement begins with a first run, and refines what a second one, gone on from there, estimates:
msr train --config configs/bundled_det.py --workdir runs/bundled_det_first --config.data.train=RECORDS --config.train.steps=5800 --config.optim.decay_steps=1000
msr train --config configs/bundled_det.py --workdir runs/bundled_det --config.data.train=RECORDS --config.init_from.deterministic=runs/bundled_det_first
"""

from ml_collections import ConfigDict

from msr_jax.config import bundled


def get_config() -> ConfigDict:
    config = bundled()
    config.method = "deterministic"
    config.optim.update({"schedule": "linear", "decay_steps": 5400})
    config.train.steps = 10_600
    return config
