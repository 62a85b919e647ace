"""Deterministic stage of the bundled model; `launch/study/study.sh` trains it three times, each from the run before.

The refinement begins with the second run, and refines what the third estimates, which heard more sounds (WIDER_RECORDS):
msr train --config configs/bundled_det.py --workdir runs/bundled_first --config.data.train=RECORDS
msr train --config configs/bundled_det.py --workdir runs/bundled_start --config.data.train=RECORDS --config.init_from.deterministic=runs/bundled_first --config.train.steps=5000 --config.optim.decay_steps=0 --config.seed=4
msr train --config configs/bundled_det.py --workdir runs/bundled_det --config.data.train=WIDER_RECORDS --config.init_from.deterministic=runs/bundled_start --config.train.steps=4000 --config.optim.decay_steps=0 --config.seed=6
"""

from ml_collections import ConfigDict

from msr_jax.config import bundled


def get_config() -> ConfigDict:
    config = bundled()
    config.method = "deterministic"
    config.optim.update({"schedule": "linear", "decay_steps": 5400})
    config.train.steps = 16_400
    return config
