#!/usr/bin/env bash
# orbax-checkpoint: a run that goes on from an earlier step saves nothing until it is past the latest one, without a word.
#
# versions: orbax-checkpoint 0.12.8, jax 0.10.2
# date: 2026-12-01
# guess: a step that is not there is saved, as the options have no interval and keep all; or `save` raises, as for a step that is there.
# seen: with 5 and 10 in the folder, `restore(5)` and then `save` of 6 to 9 give False and write nothing; nothing is raised and
#   nothing is logged as a warning. `save(10)` gives False too. 11 is saved, so that the folder then
#   mixes two runs: 10 is of the first, 11 of the second. A run that is killed before 11 has lost all.
# what helps: look at what `save` gives; `force=True`; or delete the later steps, or begin a new folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > earlier.py <<'PY'
import logging
import os
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

warnings = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
args = lambda run: ocp.args.StandardSave({"run": jnp.full(4, run)})
print("orbax-checkpoint", ocp.__version__, "jax", jax.__version__)
with ocp.CheckpointManager(os.path.abspath("run")) as manager:
    for step in (5, 10):
        manager.save(step, args=args(1))
    manager.wait_until_finished()
with ocp.CheckpointManager(os.path.abspath("run")) as manager:
    state = manager.restore(5, args=ocp.args.StandardRestore())
    for name in (None, "absl"):
        logging.getLogger(name).addHandler(handler)
    saved = {step: manager.save(step, args=args(2)) for step in (6, 7, 8, 9, 10, 11)}
    manager.wait_until_finished()
    steps = list(manager.all_steps())
    of_run = {step: int(manager.restore(step, args=ocp.args.StandardRestore())["run"][0]) for step in steps}
    forced = manager.save(7, args=args(2), force=True)
    manager.wait_until_finished()
print("what save gave:", saved, "warnings:", warnings)
print("steps, and the run that each is of:", of_run, "with force, 7:", forced)
sys.exit(0 if of_run == {5: 1, 10: 1, 11: 2} and not any(list(saved.values())[:5]) and forced and not warnings else 1)
PY
JAX_PLATFORMS=cpu venv/bin/python earlier.py
