#!/usr/bin/env bash
# orbax-checkpoint: a manager that is opened again has forgotten the scores that its preservation policy goes by.
#
# versions: orbax-checkpoint 0.12.8, jax 0.10.2
# date: 2026-11-30
# guess: `save(step, metrics={…})` with the policy `BestN(get_metric_fn=…, n=2)` keeps the two best, also over a restart.
# seen: within one manager it does. No score is written: after the folder is opened again, no step before has any, and the best
#   are deleted as the first new ones are saved (with `keep_checkpoints_without_metrics=False`; without it, all old ones stay).
#   That the options also take `best_fn`, which the policy makes look superfluous, is what has the scores written and read.
# what helps: `best_fn` beside `preservation_policy`.
set -euo pipefail
cd "$(mktemp -d)"
python3 -m venv venv
venv/bin/pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2
cat > best.py <<'PY'
import logging
import os
import sys

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

logging.disable(logging.WARNING)
print("orbax-checkpoint", ocp.__version__)


def manager(folder, has_best_fn):
    score = lambda metrics: metrics["score"]
    best = checkpoint_managers.BestN(get_metric_fn=score, n=2, keep_checkpoints_without_metrics=False)
    policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(1), best])
    options = ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=score if has_best_fn else None)
    return ocp.CheckpointManager(os.path.abspath(folder), options=options)


def saved(folder, has_best_fn, scores):
    with manager(folder, has_best_fn) as opened:
        for step, score in scores.items():
            opened.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave({})), metrics={"score": score})
        opened.wait_until_finished()
        return sorted(opened.all_steps())


kept = {}
for name, has_best_fn in (("policy alone", False), ("with best_fn", True)):
    first = saved(name, has_best_fn, {1: 1, 2: 9, 3: 3, 4: 8, 5: 2})
    kept[name] = first, saved(name, has_best_fn, {6: 0, 7: 1})
    print(f"{name}: {first}, opened again {kept[name][1]}")
sys.exit(kept != {"policy alone": ([2, 4, 5], [6, 7]), "with best_fn": ([2, 4, 5], [2, 4, 7])})
PY
venv/bin/python best.py
