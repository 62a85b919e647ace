#!/usr/bin/env bash
# optax: the global norm of many bfloat16 gradients stops growing, so that clipping clips to something else.
#
# versions: optax 0.2.8, jax 0.10.2, numpy 2.4.6
# date: 2026-12-01
# guess: `optax.tree.norm` is right within bfloat16's rounding, 0.4 %: JAX sums an array of bfloat16 in float32.
# seen: each array's sum is rounded to bfloat16, and the arrays' sums are added in bfloat16. A sum of 256 takes no more ones: 1,000
#   arrays of norm 1 have the norm 16, not 31.6. `clip_by_global_norm(1.0)` leaves them a norm of 1.98. What is found depends on
#   the order of names: a large first array hides all others. Nobody sees it in float32.
# what helps: gradients to float32 before the norm.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__, "jax", jax.__version__)
seen = {}
for dtype in (jnp.float32, jnp.bfloat16):
    grads = {f"layer_{i}": jnp.full((64,), 1 / 8, dtype) for i in range(1000)}  # each of norm 1, exactly
    clipped, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
    truly = sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(clipped)) ** 0.5
    seen[dtype] = float(optax.tree.norm(grads)), truly
    print(f"{dtype.__name__}: norm {seen[dtype][0]:.2f} (truly {1000**0.5:.2f}), after clipping to 1 truly {truly:.3f}")
good, bad = seen[jnp.float32], seen[jnp.bfloat16]
sys.exit(0 if abs(good[0] - 1000**0.5) < 0.01 and abs(good[1] - 1) < 0.01 and bad[0] == 16 and bad[1] > 1.9 else 1)
PY
