#!/usr/bin/env bash
# orbax-checkpoint: one score that is NaN has the best checkpoint deleted.
#
# versions: orbax-checkpoint 0.12.8, jax 0.10.2
# date: 2026-12-01
# guess: a validation that gave NaN is never among the best, or always; the other steps keep their order either way.
# seen: steps are sorted by score as they are, and nothing has an order beside NaN. With best_mode="max", two kept, and the scores
#   3, 2, NaN, 1 the steps of 3 and 2 are deleted; NaN and 1 stay, and 1 is called the best. What stays depends on when the NaN came.
# what helps: no metrics at all for such a step, or -inf from `best_fn`.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > best.py <<'PY'
import logging
import math
import os
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

logging.disable(logging.WARNING)
print("orbax-checkpoint", ocp.__version__, "jax", jax.__version__)


def kept(folder, scores, best_fn):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=best_fn, best_mode="max")
    with ocp.CheckpointManager(os.path.abspath(folder), options=options) as manager:
        for step, score in enumerate(scores):
            manager.save(step, args=ocp.args.StandardSave({"w": jnp.ones(2)}), metrics={"score": score})
        manager.wait_until_finished()
        found = [scores[step] for step in manager.all_steps()], scores[manager.best_step()]
    print(f"scores {scores}: kept {found[0]}, best {found[1]}")
    return found


plain = lambda metrics: metrics["score"]
guarded = lambda metrics: -math.inf if math.isnan(metrics["score"]) else metrics["score"]
late = kept("late", [3.0, 2.0, math.nan, 1.0], plain)
early = kept("early", [1.0, math.nan, 3.0, 2.0], plain)
safe = kept("safe", [3.0, 2.0, math.nan, 1.0], guarded)
bad = 3.0 not in late[0] and 2.0 not in late[0] and late[1] == 1.0
sys.exit(0 if bad and early == ([3.0, 2.0], 3.0) and safe == ([3.0, 2.0], 3.0) else 1)
PY
JAX_PLATFORMS=cpu venv/bin/python best.py
