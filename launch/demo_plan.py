"""Prints how many steps of each stage the demo trains on this machine. Called by demo.sh.

As many as the small configs say where that takes no more than MINUTES, else the same share of every stage.
"""

import sys
import time

import jax
import jax.numpy as jnp

from msr_jax.methods.stages import make_objective
from msr_jax.models.backbone import make_backbone
from msr_jax.runtime import keep_freed_memory
from msr_jax.train.main import read_config

MINUTES = 7.0
# A step's time over that of a deterministic step: one more network, and for distillation the teacher's calls as well.
STAGES = {"det": 1.0, "diffusion": 1.4, "consistency": 5.0}


def seconds_of_a_step(config: dict) -> float:
    """Loss and gradient of one batch of the deterministic stage; the quickest of some tries after compilation."""
    backbone = make_backbone(config["model"], config["compute_dtype"])
    params = backbone.init(jax.random.key(0), False)
    batch, stems = config["data"]["batch"], len(config["stems"])
    examples = {
        "stems": 0.1 * jax.random.normal(jax.random.key(1), (batch, stems, config["data"]["crop"], config["channels"])),
        "label": jnp.eye(stems)[jnp.arange(batch) % stems],
    }
    objective = make_objective(config, backbone)
    step = jax.jit(jax.value_and_grad(lambda params, key: objective(params, {}, examples, key)[0]))
    tries = []
    for k in range(5):
        started = time.perf_counter()
        jax.block_until_ready(step(params, jax.random.key(k)))
        tries.append(time.perf_counter() - started)
    return min(tries)


def main() -> None:
    configs = {stage: read_config(f"configs/unet_{stage}_small.py", []) for stage in STAGES}
    whole = {stage: config["train"]["steps"] for stage, config in configs.items()}
    keep_freed_memory()
    step = seconds_of_a_step(configs["det"])
    share = min(1.0, 60 * MINUTES / (step * sum(whole[stage] * cost for stage, cost in STAGES.items())))
    per = configs["det"]["train"]["steps_per_dispatch"]
    steps = {stage: max(per, int(share * count) // per * per) for stage, count in whole.items()}
    print(f"a step takes {step:.2f} s here: {share:.0%} of the configs' steps, {steps}", file=sys.stderr)
    print(*steps.values())


if __name__ == "__main__":
    main()
