"""What a dispatch costs: steps per second of a tiny network at 1, 10 and 100 steps per compiled call.

The training loop's own steps and batches, with a network so small that its computation takes next to no time.
"""

import argparse
import statistics
import time
from typing import Any

from msr_jax.bench.engines import peak_memory

STEPS_PER_DISPATCH = (1, 10, 100)
WIDTH, BATCH = 32, 8


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of steps in a dispatch; `seconds` is that of one step, the median of `args.repeats` runs."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from msr_jax.train.sharding import make_mesh, replicated, stacked_batch_sharding
    from msr_jax.train.state import init_state, make_train_steps

    mesh = make_mesh({"data": -1, "fsdp": 1})
    tx = optax.adam(1e-3)
    batch = BATCH * mesh.size

    def loss_fn(params, frozen, batch, key):
        return jnp.square(jnp.tanh(batch["x"] @ params["in"]) @ params["out"]).mean(), {}

    def params():
        return {"in": jnp.full((WIDTH, WIDTH), 0.1), "out": jnp.full((WIDTH, 1), 0.1)}

    steps = make_train_steps(loss_fn, tx, lambda step: 1e-3, seed=0)
    compiled = jax.jit(steps, donate_argnums=0, out_shardings=replicated(mesh))
    total = 20 if args.tiny else 1000

    def seconds_per_step(per: int) -> float:
        host = {"x": np.ones((per, 1, batch, WIDTH), np.float32)}
        sharding = stacked_batch_sharding(mesh)
        state = jax.device_put(init_state(params(), tx, 0.0, False), replicated(mesh))
        turns, began = max(total // per, 2), 0.0
        for turn in range(turns + 1):  # the first compiles
            if turn == 1:
                jax.block_until_ready(state)
                began = time.perf_counter()
            batches = {k: jax.make_array_from_process_local_data(sharding, v) for k, v in host.items()}
            state, metrics = compiled(state, {}, batches)
            np.asarray(metrics["loss"])  # as the log does
        return (time.perf_counter() - began) / (turns * per)

    rows = []
    for per in STEPS_PER_DISPATCH:
        every = [seconds_per_step(per) for _ in range(args.repeats)]
        seconds = statistics.median(every)
        rows.append(
            {
                "name": f"dispatch_{per}",
                "seconds": seconds,
                "steps_per_second": 1 / seconds,
                "speedup_over_peer": None,
                "peak_memory_bytes": peak_memory(),
                "all_seconds": every,
            }
        )
        print(f"{per:>4} steps per dispatch: {1 / seconds:10.0f} steps/s")
    return rows
