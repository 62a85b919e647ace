"""Deterministic stage of the bundled model; `launch/study.sh` trains it twice.

The refinement begins with a first run, and refines what a second one estimates, which went on from there:
msr train --config configs/bundled_det.py --workdir runs/bundled_start --config.data.train=RECORDS
msr train --config configs/bundled_det.py --workdir runs/bundled_det --config.data.train=RECORDS --config.init_from.deterministic=runs/bundled_start --config.train.steps=5000 --config.optim.decay_steps=0 --config.seed=4
"""

from ml_collections import ConfigDict

from msr_jax.config import bundled


def get_config() -> ConfigDict:
    config = bundled()
    config.method = "deterministic"
    config.optim.update({"schedule": "linear", "decay_steps": 5400})
    config.train.steps = 16_400
    return config
