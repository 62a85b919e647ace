"""Prints how many steps of each stage the demo trains on this machine. Called by demo.sh with the seconds it has taken.

As many as the small configs say where the demo then takes no more than MINUTES, else the same share of every stage.
"""

import sys
import time

import jax
import jax.numpy as jnp

from msr_jax.config_files import read_config
from msr_jax.machine import keep_freed_memory
from msr_jax.models.backbone import make_backbone

MINUTES = 13.5
# What comes besides steps (starting, compiling, the table), in passes as below: 5.7 minutes where a pass takes 0.082 s.
BESIDES = 4200
# A step's time over that of the deterministic network's pass on its batch, as measured on two cores: the gradient; one
# more network; and for distillation the teacher's calls as well.
STAGES = {"det": 4.5, "diffusion": 6.0, "consistency": 26.0}


def seconds_of_a_pass(config: dict) -> float:
    """Of the deterministic network on one batch: the quickest of some tries. Its gradient takes long to compile."""
    backbone = make_backbone(config["model"], config["compute_dtype"])
    shapes = jax.eval_shape(lambda: backbone.init(jax.random.key(0), False))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # drawing them takes longer
    batch, stems = config["data"]["batch"], len(config["stems"])
    mixture = 0.1 * jax.random.normal(jax.random.key(1), (batch, config["data"]["crop"], config["channels"]))
    label = jnp.eye(stems)[jnp.arange(batch) % stems]
    tries = []
    for _ in range(8):
        started = time.perf_counter()
        jax.block_until_ready(backbone.separate(params, mixture, label))
        tries.append(time.perf_counter() - started)
    return min(tries)


def main() -> None:
    configs = {stage: read_config(f"configs/unet_{stage}_small.py", []) for stage in STAGES}
    whole = {stage: config["train"]["steps"] for stage, config in configs.items()}
    keep_freed_memory()
    unit = seconds_of_a_pass(configs["det"])
    left = max(60 * MINUTES - float(sys.argv[1]) - unit * BESIDES, 0.0)
    share = min(1.0, left / (unit * sum(whole[stage] * cost for stage, cost in STAGES.items())))
    per = configs["det"]["train"]["steps_per_dispatch"]
    steps = {stage: max(per, int(share * count) // per * per) for stage, count in whole.items()}
    print(f"a pass takes {unit:.3f} s here: {share:.0%} of the configs' steps, {steps}", file=sys.stderr)
    print(*steps.values())


if __name__ == "__main__":
    main()
